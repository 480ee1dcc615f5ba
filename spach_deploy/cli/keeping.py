"""What an interrupted export left: the earlier bundle, nothing, or the new bundle."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from spach_deploy.options.specs import ExportOptions
from spach_deploy.pipeline.estimate import target_directory


@dataclasses.dataclass(frozen=True)
class TargetBefore:
    """The target before the export: where it is, and which directory was there, if any."""

    target: Path | None
    before: int | None

    @classmethod
    def of(cls, options: ExportOptions) -> TargetBefore:
        """As it is now."""
        target = target_directory(options)
        return cls(target, _inode(target))

    def sentence(self) -> str:
        """What is there now. A bundle moves into place in one step, so that another directory is a whole new one."""
        now = _inode(self.target)
        if now != self.before:
            return f"The new bundle was written before that: {self.target} is complete."
        if now is None:
            return "Nothing was written."
        return f"Nothing was written; {self.target} is as it was."


def _inode(path: Path | None) -> int | None:
    try:
        return None if path is None else path.stat().st_ino
    except OSError:
        return None
