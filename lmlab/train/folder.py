"""The folder of a run: one process at a time, one config for good."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lmlab.core.errors import UserError
from lmlab.core.serialize import CLASS, from_json, to_json

LOCK, CONFIG = ".lock", "config.json"


@contextmanager
def open_run(folder: Path) -> Iterator[Path]:
    """The folder, created if needed and locked while inside. Raises `UserError` if it is in use or read-only.

    The kernel frees the lock when the process ends, however it ends.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("a+")
    except OSError as error:
        raise UserError("run folder", str(folder), f"a folder that can be written to ({error.strerror})",
                        "Choose another with --out.") from error  # fmt: skip
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            raise UserError("run folder", str(folder), "a folder that no other run is writing to",
                            f"Process {lock.read().strip() or '?'} is: wait for it, or choose another with --out.",
                            ) from None  # fmt: skip
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield folder


def settle_config(folder: Path, config: Any, free: tuple[str, ...] = ()) -> None:
    """Write `config.json`, or check that the folder's own says the same. Raises `UserError` with what differs.

    free: first names of fields that may differ; the new ones are written.
    """
    path = folder / CONFIG
    new = to_json(config)
    if not path.exists():
        write_json(path, new)
        return
    old = read_json(path)
    differing = [each for each in _differences(old, new) if each[0].split(".")[0] not in free]
    if differing:
        shown = "; ".join(f"{name} was {was!r}, now {now!r}" for name, was, now in differing[:4])
        raise UserError("run folder", str(folder), "the config that the run was begun with",
                        f"{shown}. Choose another folder with --out, or give the old values.")  # fmt: skip


def read_config(folder: Path) -> Any:
    """The config of a run folder. Raises `UserError` if there is none."""
    if not is_run(folder):
        raise UserError("run folder", str(folder), f"the folder of a run, with its {CONFIG}")
    return from_json(read_json(folder / CONFIG))


def is_run(folder: Path) -> bool:
    """Whether this is a run folder; a folder of transformers has a config.json too."""
    return (folder / CONFIG).is_file() and CLASS in read_json(folder / CONFIG)


def read_json(path: Path) -> Any:
    """Parsed JSON. Raises `UserError` if it is none."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError("file", str(path), f"readable JSON ({error})") from error


def write_json(path: Path, data: Any) -> None:
    """Write JSON so that the file is either the old or the new one, whole."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("w") as file:
            json.dump(data, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise UserError("run folder", str(path.parent), f"a folder that can be written to ({error.strerror})",
                        "Make room, or choose another with --out.") from error  # fmt: skip


def _differences(old: Any, new: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    """Dotted name, old and new value of every leaf that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*new, *(key for key in old if key not in new)]
        parts = [_differences(old.get(key), new.get(key), f"{name}.{key}".lstrip(".")) for key in keys]
        return [difference for part in parts for difference in part]
    return [] if old == new else [(name, old, new)]
