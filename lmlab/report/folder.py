"""The folder that a command leaves its page and files in: seen to be writable first, written whole or not at all."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lmlab.core.errors import UserError


def open_folder(folder: Path) -> None:
    """Make the folder, and see that it can be written before anything is computed. Raises `UserError`."""
    trial = folder / f".{os.getpid()}.partial"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        trial.touch()
        trial.unlink()


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """What cannot be written inside of this raises `UserError` for --out."""
    try:
        yield
    except OSError as error:
        raise UserError("--out", str(folder), f"a folder that can be written ({error.strerror})") from error


def replace_all(files: dict[Path, bytes]) -> None:
    """Write all files beside their places first, and only then put them there."""
    partial = {path: path.with_name(f"{path.name}.{os.getpid()}.partial") for path in files}
    try:
        for path in files:
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, f"{path.name} is a folder")
        for path, content in files.items():
            partial[path].write_bytes(content)
        for path, beside in partial.items():
            beside.replace(path)
    finally:
        for beside in partial.values():
            beside.unlink(missing_ok=True)
