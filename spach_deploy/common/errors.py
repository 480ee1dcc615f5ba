"""The exceptions that users can meet, and the exit code with which a command ends for each.

    SpachError                      1
    ├── UsageError                  2   an option or an input is wrong; says what to do instead
    │   ├── ModelError                  no such model, or not with these options
    │   ├── CheckpointError             the file cannot be read, or its tensors fit no model
    │   ├── ImageError                  images missing, unreadable or unusable
    │   └── BundleError                 not a bundle, or it cannot be written
    │       └── ChangedFileError    1   a bundle's file is not the one that was exported
    ├── MismatchError               1   the numbers disagree
    │   ├── RewriteError                a rewrite is not equal to what it replaced
    │   ├── CertificateError            the graph breaks a promise that the certificate makes
    │   └── PrecisionError              the requested precision overflows, or was not achieved
    └── UnavailableError            3   this machine cannot do or verify it
        ├── MissingPackageError         a package is absent; names the install command
        │   └── OldPackageError             a package is older than any that was run
        └── BuildError                  the engine compiler refused

Commands print `str(error)` as one sentence with the next step and exit with `exit_code`; no traceback unless
`--debug` is given. `Interrupted` (Ctrl-C) is not an error of these kinds: commands end with 130 then.
"""

from __future__ import annotations

from typing import Any


class SpachError(Exception):
    """Base of all errors of this package. `hint`: the next step for the user, printed after the message."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}" if self.hint else self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (type(self), dict(vars(self)))


def _restored(kind: type[SpachError], attributes: dict[str, Any]) -> SpachError:
    """Unpickle an error from its attributes: the constructors of subclasses take other arguments than these."""
    error = kind.__new__(kind)
    error.args = (attributes["message"],)
    vars(error).update(attributes)
    return error


class UsageError(SpachError):
    """An option or input is wrong."""

    exit_code = 2


class ModelError(UsageError):
    """There is no such model, or it does not exist with these options."""


class CheckpointError(UsageError):
    """A checkpoint that cannot be read, or whose tensors do not fit."""


class ImageError(UsageError):
    """Images that are missing, unreadable or unusable."""


class BundleError(UsageError):
    """Not a bundle, or one that cannot be written."""


class ChangedFileError(BundleError):
    """A bundle whose files are not those that were exported: changed, or missing."""

    exit_code = 1


class MismatchError(SpachError):
    """The numbers disagree."""

    exit_code = 1


class RewriteError(MismatchError):
    """A rewritten model is not equal to the model it came from."""


class CertificateError(MismatchError):
    """The exported graph breaks a promise that the certificate makes."""


class PrecisionError(MismatchError):
    """A precision that cannot hold the model's numbers, or was not achieved."""


class UnavailableError(SpachError):
    """This machine cannot do it, or cannot verify it."""

    exit_code = 3


class MissingPackageError(UnavailableError):
    """An optional package is not installed."""

    def __init__(self, package: str, purpose: str, install: str) -> None:
        super().__init__(f"{purpose} needs {package}, which is not installed here.", f"Install it: {install}")
        self.package = package


class OldPackageError(MissingPackageError):
    """A package is installed in a version older than the lowest that is tested."""

    def __init__(self, package: str, version: str, requirement: str) -> None:
        message = f"{package} {version} is too old: spach-deploy needs {requirement}."
        SpachError.__init__(self, message, f"Install it: pip install '{requirement}'")
        self.package = package


class BuildError(UnavailableError):
    """The engine compiler refused the graph or the options."""


def printable(name: str) -> str:
    """`name` with control characters and undecodable bytes escaped.

    Names in archives may hold escape sequences, which a terminal would execute.
    """
    return name if name.isprintable() else "".join(c if c.isprintable() else _escaped(c) for c in name)


def printable_lines(text: str) -> str:
    """`printable` of each line."""
    return "\n".join(map(printable, text.split("\n")))


def _escaped(character: str) -> str:
    """An escape sequence. Bytes that are not UTF-8, in Python U+DC80 to U+DCFF, become `\\x80` to `\\xff`."""
    code = ord(character)
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else character.encode("unicode_escape").decode("ascii")
