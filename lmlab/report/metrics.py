"""The log of a run: one JSON object a line in metrics.jsonl, and the same for TensorBoard."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tensorboardX import SummaryWriter

from lmlab.core.errors import UserError

METRICS = "metrics.jsonl"


class MetricsLog:
    """Appends rows {"step", "kind", values...}; kind is train, eval, or speed (whatever depends on the clock).

    Opening drops the rows after the step that the run goes on from, and a last line that was cut off: they will
    be written again, byte for byte but for the speed.
    """

    def __init__(self, folder: Path, resume_step: int) -> None:
        """Open the log of a run folder. Raises `UserError` if it cannot be written."""
        self._path = folder / METRICS
        try:
            _drop_after(self._path, resume_step)
            self._file = self._path.open("a", buffering=1)
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step + 1)
        except OSError as error:
            raise _unwritable(self._path, error) from error

    def write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """Add a row. Numbers keep every digit; those that are not finite become text, so that the line is JSON."""
        row = {"step": step, "kind": kind} | {name: _plain(value) for name, value in values.items()}
        try:
            self._file.write(json.dumps(row) + "\n")
            for name, value in values.items():
                self._board.add_scalar(f"{kind}/{name}", value, step)
        except OSError as error:
            raise _unwritable(self._path, error) from error

    def __enter__(self) -> Self:
        """The log itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the files."""
        self._file.close()
        self._board.close()


def _plain(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError("run folder", str(path.parent), f"room to write {path.name} ({error.strerror})",
                     "Make room and run the same command again; it goes on from the last checkpoint.")  # fmt: skip


def _drop_after(path: Path, step: int) -> None:
    """Rewrite the file without the rows after `step`, whole or not at all."""
    if not path.exists():
        return
    kept = [row for row in read_rows(path) if row["step"] <= step]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
    partial.replace(path)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file, up to one that a kill cut off."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break  # the line that a kill cut off, and nothing comes after it
    return rows


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Rows of a run, in the order they were written. Raises `UserError` if there is no log."""
    path = folder / METRICS
    if not path.is_file():
        raise UserError("run folder", str(folder), f"the folder of a run, with its {METRICS}")
    return read_rows(path)
