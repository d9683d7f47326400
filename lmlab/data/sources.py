"""Where text comes from: a stream of documents for each source, and a hash that tells when it changes."""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from lmlab.data.config import Files, PythonLibrary, Source, Tfds
from lmlab.data.folders import write_atomically

Split: TypeAlias = Literal["train", "heldout"]


@dataclass(frozen=True)
class Document:
    """One text and the name by which messages and logs call it."""

    id: str
    text: str


def documents(source: Source, split: Split, cache_dir: Path) -> Iterator[Document]:
    """The documents of one split, one at a time, in a fixed order.

    Args:
        source: where from.
        split: "train" or "heldout"; no document is in both.
        cache_dir: where a source that has to be prepared is kept.

    Raises:
        UserError: nothing there, or text that cannot be read; names the file, the line or byte, the field.
    """
    # Each reader is imported where it is used: tensorflow_datasets alone takes a second to import.
    match source:
        case PythonLibrary():
            from lmlab.data.python_library import library_documents

            pairs = library_documents(source, split, cache_dir)
        case Files():
            from lmlab.data.files import file_documents

            pairs = file_documents(source, split)
        case Tfds():
            from lmlab.data.catalogue import catalogue_documents

            pairs = catalogue_documents(source, split)
    return (Document(name, text) for name, text in pairs)


def fingerprint(source: Source, split: Split, cache_dir: Path) -> str:
    """Hash of the text of one split and of the settings that choose it; equal hashes mean equal documents.

    Files are hashed whole once and remembered by path, size and time of change. A tfds data set is taken to
    be what its name, version, split expression and number of examples say.

    Raises:
        UserError: as `documents`, for what shows before any text is read.
    """
    content: object
    match source:
        case PythonLibrary():
            from lmlab.data.standard_library import library_digest

            content = library_digest()
        case Files():
            from lmlab.data.files import split_files

            content = [(name, file_digest(path, cache_dir)) for name, path in split_files(source, split)]
        case Tfds():
            from lmlab.data.catalogue import catalogue_version

            content = catalogue_version(source, split)
    # Paths do not count, so that a corpus that is moved keeps its cache.
    paths = ("train", "heldout", "data_dir")
    settings = {key: value for key, value in asdict(source).items() if key not in paths}
    record = [type(source).__name__, split, settings, bool(getattr(source, "heldout", "")), content]
    return hashlib.blake2b(json.dumps(record).encode(), digest_size=16).hexdigest()


def file_digest(path: Path, cache_dir: Path) -> str:
    """Hash of a file's bytes; remembered in `cache_dir` while its size and time of change stay the same."""
    status = path.stat()
    key = f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"
    memo = cache_dir / "file_hashes" / f"{hashlib.blake2b(key.encode(), digest_size=16).hexdigest()}.txt"
    if memo.is_file() and (known := memo.read_text(encoding="utf-8").strip()):
        return known
    with path.open("rb") as handle:
        digest = hashlib.file_digest(handle, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    # The memo only saves time; a disk that is full or read-only is reported by what has to be stored.
    with contextlib.suppress(OSError):
        memo.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(memo, digest)
    return digest
