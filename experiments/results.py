"""What experiments do with what they found: tell how far they are, keep the numbers, draw in the style of reports."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lmlab.report.plots import STYLE


def say(text: str) -> None:
    """Tell what is being done, beside what is printed at the end."""
    print(text, file=sys.stderr, flush=True)


def keep(result: dict[str, Any], out: str) -> Path:
    """Write results.json to a folder, which is made. Returns the folder, for figures."""
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(result, indent=2))
    return folder


@contextmanager
def figure(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure to draw into, in inches; written when it is left. The same numbers give the same bytes."""
    with rc_context(STYLE):
        drawn = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(drawn)
        yield drawn
        drawn.savefig(path, metadata={"Date": None})
