from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from spach_deploy.common.errors import UsageError
from spach_deploy.common.files import parse_json, read_json, read_npz, read_text
from spach_deploy.data.labels import read_labels
from spach_deploy.options.recipe import read_recipe
from spach_deploy.pipeline.cache import content_digest


def test_a_named_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match=re.escape("Recipe x cannot be read (it is a pipe). Give a TOML file.")):
        read_text(tmp_path / "pipe", "Recipe x", "Give a TOML file.")


def test_what_never_ends_is_no_text() -> None:
    with pytest.raises(UsageError, match=r"Recipe x cannot be read \(it has more than 67,108,864 bytes\)"):
        read_text(Path("/dev/zero"), "Recipe x", "Give a TOML file.")


def test_a_device_is_neither_hashed_nor_read_as_npz() -> None:
    """Of /dev/zero or a pipe both would never end; this device ends at once where it is read."""
    with pytest.raises(OSError, match="it is not a regular file"):
        content_digest(Path(os.devnull))
    with pytest.raises(ValueError, match="it is not a regular file"):
        read_npz(Path(os.devnull), {"input": 1})


def test_the_shells_pipe_is_read() -> None:
    program = (
        "import sys; from spach_deploy.common.files import Path, read_text;"
        " print(read_text(Path(sys.argv[1]), str(), str()))"
    )
    command = ["bash", "-c", f'{sys.executable} -c "{program}" <(echo text)']
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "text\n\n"


@pytest.mark.parametrize(
    ("content", "reason"), [(b"\xff", "it is not UTF-8"), (None, "No such file or directory")], ids=["bytes", "none"]
)
def test_what_cannot_be_read_is_named(content: bytes | None, reason: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "file").write_bytes(content)
    with pytest.raises(UsageError, match=re.escape(f"--labels file cannot be read ({reason}). Give names.")):
        read_text(tmp_path / "file", "--labels file", "Give names.")


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    """As Windows editors write it."""
    (tmp_path / "names.txt").write_bytes(b"\xef\xbb\xbfcat\ndog\n")
    assert read_labels(tmp_path / "names.txt", 2) == ("cat", "dog")
    (tmp_path / "recipe.toml").write_bytes(b'\xef\xbb\xbfmodel = "ms_conv_xxs"\n')
    assert read_recipe(tmp_path / "recipe.toml")["model"] == "ms_conv_xxs"


@pytest.mark.parametrize("end", ["\n", " \n\n"])
def test_an_empty_last_line_is_called_that(end: str, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text(f"cat\ndog\n{end}")
    with pytest.raises(UsageError, match=r"names\.txt has an empty last line: \d lines for 2 classes\. Remove it"):
        read_labels(tmp_path / "names.txt", 2)


def test_a_path_with_a_nul_character_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text('images = "photos\\u0000"\n')
    with pytest.raises(UsageError, match="images has a NUL character"):
        read_recipe(tmp_path / "recipe.toml")


def test_json_that_can_be_read_in_two_ways_is_none() -> None:
    with pytest.raises(ValueError, match="'sha256' is in it twice"):
        parse_json('{"files": {"sha256": "a", "sha256": "b"}}')
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json("[" * 100_000)


def test_a_json_file_is_not_read_beyond_what_such_files_have(tmp_path: Path) -> None:
    (tmp_path / "large").write_text("[" + " " * 2000 + "]")
    with pytest.raises(OSError, match="has more than 1,000 bytes"):
        read_json(tmp_path / "large", 1000)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="it is a pipe"):
        read_json(tmp_path / "pipe")
