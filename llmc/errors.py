"""The errors llmc raises on purpose: one clear line each, naming the file or option and the field.

Every one derives from `LlmcError`, so a program can catch the lot; each also derives from the
built-in error a Python user would expect.  The command line prints `str(error)` and exits with 1.
"""

from __future__ import annotations

import os


class LlmcError(Exception):
    """Base of every deliberate error."""


class FileFormatError(LlmcError, ValueError):
    """A file is not what it should be: wrong magic, version, size, or a value out of range."""

    def __init__(self, path: str | os.PathLike[str], field: str, detail: str) -> None:
        super().__init__(f"{os.fspath(path)}: {field}: {detail}")
        self.path, self.field = os.fspath(path), field


class ConfigError(LlmcError, ValueError):
    """An option or a configuration field cannot be used as given."""

    def __init__(self, field: str, detail: str) -> None:
        super().__init__(f"{field}: {detail}")
        self.field = field


class DivergenceError(LlmcError, ArithmeticError):
    """A loss or a gradient norm stopped being finite; the update was not applied."""


class DownloadError(LlmcError, OSError):
    """Something could not be fetched, or what came is not what was expected."""


class MissingDependencyError(LlmcError, ImportError):
    """An optional package is needed; the message says which, and how to install it."""


class DeviceError(LlmcError, RuntimeError):
    """A GPU, or what is needed to use it, is missing, does not suffice, or has failed."""


class DeviceMemoryError(DeviceError, MemoryError):
    """A GPU has less memory than was asked for."""
