"""Folders that are either whole or absent: built aside, flushed to disk, then renamed into place."""

import errno
import fcntl
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from lmlab.core.errors import UserError

META = "meta.json"
"""What a sealed folder says of itself."""
_CHECKED_BLOCKS, _BLOCK_BYTES = 128, 65536
_FULL = (errno.ENOSPC, errno.EDQUOT)


def cache_root(cache_dir: str | Path = "") -> Path:
    """The folder for caches: `cache_dir`, else $LMLAB_CACHE, else ~/.cache/lmlab. Made if absent.

    A folder that holds all that is needed may be read-only.

    Raises:
        UserError: it cannot be made.
    """
    chosen = str(cache_dir) or os.environ.get("LMLAB_CACHE", "") or "~/.cache/lmlab"
    root = Path(chosen).expanduser()
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(root, error) from error
    return root


def build_once(
    target: Path, is_whole: Callable[[Path], bool], build: Callable[[Path], None], *, resume: bool = False
) -> Path:  # fmt: skip
    """`target`, built by `build(empty_folder)` unless `is_whole(target)`; kill -9 leaves nothing half done.

    One process builds while the others wait on a lock that the system lets go of when its holder dies. So
    whoever holds the lock knows that a half-built folder beside it belongs to nobody, and removes it; or with
    `resume` hands it to `build`, which then has to know how far it came.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    if is_whole(target):
        return target
    partial = target.with_name(f"{target.name}.partial")
    with _locked(target.with_name(f"{target.name}.lock")):
        if is_whole(target):
            return target
        if not resume:
            shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True, exist_ok=resume)
            build(partial)
            _flush(partial)
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)
            _flush_folder(target.parent)
        except OSError as error:
            explained = _explain(partial, error)
            if error.errno in _FULL:
                shutil.rmtree(partial, ignore_errors=True)
            raise explained from error
        finally:
            if not resume:
                shutil.rmtree(partial, ignore_errors=True)
    return target


def seal(folder: Path, meta: Mapping[str, Any]) -> None:
    """Write META: what is given, and the size and checksum of every file."""
    sums = {path.name: _checksum(path) for path in sorted(folder.iterdir()) if path.name != META}
    (folder / META).write_text(json.dumps({**meta, "files": sums}, indent=1), encoding="utf-8")


def is_sealed(folder: Path, version: int) -> bool:
    """Whether META is there, has this `format`, and every file is as it was sealed.

    The checksum covers up to 8 MB of each file, spread evenly.
    """
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        return meta["format"] == version and all(
            path.stat().st_size == sums[0] and _checksum(path) == sums
            for path, sums in ((folder / name, sums) for name, sums in meta["files"].items())
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _checksum(path: Path) -> list[int]:
    """Size, and CRC-32 over evenly spread blocks: whole below 8 MB, and still quick for a terabyte."""
    size, crc = path.stat().st_size, 0
    step = max(_BLOCK_BYTES, -(-size // _CHECKED_BLOCKS))
    with path.open("rb") as handle:
        for position in chain(range(0, size, step), [max(0, size - _BLOCK_BYTES)]):
            handle.seek(position)
            crc = zlib.crc32(handle.read(_BLOCK_BYTES), crc)
    return [size, crc]


def write_atomically(path: Path, text: str) -> None:
    """Replace the file by `text` in one step; the last of several writers wins."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Replace the .npz by these arrays in one step. Raises OSError where there is no room; the old file then stays."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        np.savez(file, **arrays)
    partial.replace(path)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = path.open("ab")
    except OSError as error:
        raise _explain(path.parent, error) from error
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as handle:
                os.fsync(handle.fileno())
        else:
            _flush_folder(path)
    _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    # The names in a folder are data of the folder, which has to reach the disk as well.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _explain(partial: Path, error: OSError) -> Exception:
    if error.errno in _FULL:
        written = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
        free = shutil.disk_usage(partial.parent).free
        return UserError(
            "data.cache_dir", str(partial.parent),
            f"space for more than {written:,} bytes of {partial.stem}; {free:,} bytes are free",
            "The half-written files were removed. Free some space or name a folder on another disk.",
        )  # fmt: skip
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return _unwritable(partial.parent, error)
    return error


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(
        "data.cache_dir", str(folder), f"a folder that can be written ({error.strerror})",
        "Name another one, or set LMLAB_CACHE.",
    )  # fmt: skip
