"""Stages of long preparations: folders that are whole or absent, filled block by block, gone on with after a kill."""

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lmlab.data.folders import build_once, is_sealed, seal, write_atomically
from lmlab.data.progress import advancing

FORMAT = 1
_DONE = "done.txt"


def stage(
    root: Path, name: str, inputs: Mapping[str, Any], build: Callable[[Path], Mapping[str, Any] | None]
) -> tuple[Path, str]:  # fmt: skip
    """The folder of a stage, and the hash of its inputs: made by `build(folder)` unless it is there whole.

    `build` may find in the folder what it left when it was killed; what it returns is noted in the folder.

    Args:
        root: the folder for caches.
        name: begins the name of the folder.
        inputs: all that decides what is in it.
        build: fills it.
    """
    text = repr(sorted(inputs.items()))
    key = hashlib.blake2b(f"{FORMAT} {name} {text}".encode(), digest_size=10).hexdigest()

    def fill(folder: Path) -> None:
        noted = build(folder)
        for left in [*folder.glob("*.new"), *folder.glob("*.partial")]:
            left.unlink()
        seal(folder, {"format": FORMAT, "inputs": text, **(noted or {})})

    target = root / f"{name}-{key}"
    return build_once(target, lambda folder: is_sealed(folder, FORMAT), fill, resume=True), key


def open_array(path: Path, shape: tuple[int, ...], dtype: Any) -> np.memmap:
    """An .npy file to be filled, as it was left or all zeros; shapes are the business of the stage's key.

    Its space is taken at once: a disk that is full is then an error here, and not a signal when a page is written.
    """
    if path.is_file():
        return np.lib.format.open_memmap(path, mode="r+")
    # Aside first, so that a file with this name has its header.
    aside = path.with_suffix(".new")
    np.lib.format.open_memmap(aside, mode="w+", dtype=dtype, shape=shape)
    if hasattr(os, "posix_fallocate"):  # macOS has none.
        with aside.open("r+b") as handle:
            os.posix_fallocate(handle.fileno(), 0, aside.stat().st_size)
    aside.replace(path)
    return np.lib.format.open_memmap(path, mode="r+")


def in_blocks(
    folder: Path, label: str, count: int, block: int, fill: Callable[[int, int], None], *arrays: np.memmap
) -> None:  # fmt: skip
    """Call `fill(begin, end)` for every block that no earlier attempt finished; at most one is done twice.

    Args:
        folder: notes how far it came.
        label: what progress is called.
        count: of documents.
        block: documents of a call.
        fill: writes the block's part of the arrays.
        arrays: are on disk before the note says so.
    """
    note = folder / _DONE
    done = int(note.read_text(encoding="utf-8")) if note.is_file() else 0
    with advancing(label, count) as advance:
        for begin in range(done, count, block):
            end = min(begin + block, count)
            fill(begin, end)
            for array in arrays:
                array.flush()
            write_atomically(note, str(end))
            advance(end)
