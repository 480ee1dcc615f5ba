"""Where a case happens: a directory of its own, whose every file is looked at before and afterwards.

work/       the current directory: inputs, and out/ and build/, the only places where results belong
home/       HOME; caches may be written below home/.cache
temporary/  TMPDIR; empty again when the command has ended
outside/    what no command has any business with; inputs climb to it
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import stat
from pathlib import Path

WRITABLE = ("work/out/", "work/build/", "home/.cache/", "temporary/")
REPORTS = ("report.json", "report.html")
"""What spach-validate may write again beside a bundle's manifest."""

CANARY = "pwned"
"""Name of the file that code in an input tries to write, in every folder that it can name."""

SENTINELS = ("outside/kept.txt", "home/kept.txt", "work/kept.txt", "work/out/kept.txt", "kept.txt")

Tree = dict[str, str]
"""Path relative to the box -> what is there."""


@dataclasses.dataclass(frozen=True)
class Box:
    """`root` and the folders in it."""

    root: Path

    @classmethod
    def new(cls, root: Path) -> Box:
        """Make the folders and what must survive in them."""
        for name in ("work/out", "home/.cache", "temporary", "outside"):
            (root / name).mkdir(parents=True)
        for name in SENTINELS:
            (root / name).write_text("Leave me alone.\n", encoding="utf-8")
        return cls(root)

    @property
    def work(self) -> Path:
        """The current directory of the command."""
        return self.root / "work"

    @property
    def outside(self) -> Path:
        """What is not the command's."""
        return self.root / "outside"

    def put(self, name: str, content: bytes | str) -> str:
        """Write a file in the working folder; its path as the command takes it."""
        path = self.work / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content)
        return name

    def bring(self, original: Path, name: str) -> Path:
        """Copy a file or folder into the working folder."""
        target = self.work / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if original.is_dir():
            shutil.copytree(original, target)
        else:
            shutil.copyfile(original, target)
        return target

    def environment(self) -> dict[str, str]:
        """Variables of a process that works in the box."""
        home = self.root / "home"
        return {
            "HOME": str(home),
            "XDG_CACHE_HOME": str(home / ".cache"),
            "TMPDIR": str(self.root / "temporary"),
            "COLUMNS": "100",
        }

    def tree(self) -> Tree:
        """Everything in the box: the hash of a file, the target of a link, the kind of anything else."""
        return {
            str(path.relative_to(self.root)): _what(path)
            for folder, folders, files in os.walk(self.root)
            for path in (Path(folder, name) for name in (*folders, *files))
        }


def _what(path: Path) -> str:
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        return f"link to {os.readlink(path)}"
    if stat.S_ISDIR(status.st_mode):
        return "folder"
    if stat.S_ISREG(status.st_mode) and os.access(path, os.R_OK):
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return oct(status.st_mode)


def is_allowed(relative: str) -> bool:
    """Whether a command may write to this path of the box."""
    return f"{relative}/".startswith(WRITABLE) or (relative.startswith("work/") and Path(relative).name in REPORTS)


def is_folder_of_torch(path: str) -> bool:
    """The empty folder that torch.onnx.export makes among the temporary files, for a cache that nothing fills."""
    return os.path.basename(path).startswith("torchinductor_")
