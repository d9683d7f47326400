"""What experiments do beside training: tell how far they are, and keep what they found."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def say(text: str) -> None:
    """Tell what is being done, beside what is printed at the end."""
    print(text, file=sys.stderr, flush=True)


def deviation(values: Sequence[float]) -> float:
    """Standard deviation over seeds; of one seed 0."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def keep(result: dict[str, Any], out: str) -> Path:
    """Write results.json to a folder, which is made. Returns the folder, for figures. ValueError: NaN, infinity."""
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(result, indent=2, allow_nan=False))
    return folder


def carry_out(
    options: Any, run: Callable[[Any], dict[str, Any]], draw: Callable[[dict[str, Any], Path], None],
    table: Callable[[dict[str, Any]], str], figure: str,
) -> int:  # fmt: skip
    """Run an experiment, write what it found and its figure to `options.out`, print its table."""
    from lmlab.core.runtime import prepare

    prepare()
    result = run(options)
    draw(result, keep(result, options.out) / figure)
    print(table(result))
    return 0
