"""The text that every Python carries: the sources of the standard library's modules, and the help topics."""

import functools
import hashlib
import importlib.util
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__"}
"""Other people's packages, tests (odd on purpose), and character tables that a program wrote."""
SKIPPED_FILES = {"pydoc_data/topics.py", "html/entities.py", "pydoc_data/module_docs.py"}
"""One literal each; the help topics are read as text instead."""


def library_texts() -> Iterator[tuple[str, str]]:
    """(name, text) of every document, sorted by name: "email/message.py", ..., "topics/with"."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(_sources(root)):
        try:
            yield path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # A handful of modules are written in another encoding.
    if importlib.util.find_spec("pydoc_data.topics"):  # Some distributions leave the help out.
        from pydoc_data.topics import topics

        yield from ((f"topics/{topic}", text) for topic, text in sorted(topics.items()))


@functools.cache
def library_digest() -> str:
    """Hash of all documents and their names; reads 10 MB once in a process."""
    digest = hashlib.blake2b(digest_size=16)
    for name, text in library_texts():
        digest.update(f"{name}\0{text}\0".encode())
    return digest.hexdigest()


def _sources(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        kept = (name for name in folders if name not in SKIPPED_FOLDERS)
        folders[:] = [name for name in kept if not name.startswith("config-")]
        for path in (Path(folder, name) for name in files if name.endswith(".py")):
            generated = path.name.startswith("_sysconfigdata")
            if not generated and path.relative_to(root).as_posix() not in SKIPPED_FILES:
                yield path
