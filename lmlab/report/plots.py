"""Curves of a run as figures that stay readable at the width of a phone."""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

TRAIN, HELD_OUT, INK = "#0072B2", "#D55E00", "#666666"
"""Blue and vermilion of Okabe and Ito, told apart by everybody; a grey that is readable on white and on black."""
STYLE: Any = {
    "font.size": 11, "font.family": "sans-serif", "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "text.color": INK,
    "axes.grid": True, "grid.color": INK, "grid.alpha": 0.15, "svg.fonttype": "none", "svg.hashsalt": "lmlab",
}  # fmt: skip

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Plot:
    """One figure: which value of which kinds of rows it shows."""

    name: str
    title: str
    key: str
    kinds: tuple[str, ...]
    unit: str = ""


PLOTS = (
    Plot("loss", "Loss", "loss", ("train", "eval"), "nats per token"),
    Plot("bits_per_byte", "Bits per byte", "bits_per_byte", ("train", "eval"), "bits per byte"),
    Plot("grad_norm", "Gradient norm", "grad_norm", ("train",)),
    Plot("throughput", "Throughput", "tokens_per_second", ("speed",), "tokens per second"),
)


def series(rows: Rows, kind: str, key: str) -> tuple[list[int], list[float]]:
    """Steps and values of a key in the rows of a kind; values that are not finite are left out."""
    found = [(row["step"], row[key]) for row in rows if row["kind"] == kind and isinstance(row.get(key), int | float)]
    return [step for step, _ in found], [float(value) for _, value in found]


def smooth(values: Sequence[float], memory: float) -> list[float]:
    """Exponential moving average, corrected for its start as Adam's moments are."""
    total, weight, out = 0.0, 0.0, []
    for value in values:
        total, weight = memory * total + (1 - memory) * value, memory * weight + 1 - memory
        out.append(total / weight)
    return out


@contextmanager
def drawing(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure to draw into, in inches; written when it is left. The same numbers give the same bytes."""
    with rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        figure.savefig(path, transparent=True, metadata={"Date": None})


def draw(plot: Plot, rows: Rows) -> Figure | None:
    """The figure, or None where no row has the value."""
    data = {kind: series(rows, kind, plot.key) for kind in plot.kinds}
    if not any(steps for steps, _ in data.values()):
        return None
    with rc_context(STYLE):
        figure = Figure(figsize=(6, 3.2), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for kind, (steps, values) in data.items():
            if steps:
                _curve(axes, kind, steps, values)
        axes.set_title(plot.title, loc="left", fontsize=12, fontweight="bold")
        axes.set_xlabel("step")
        axes.set_ylabel(plot.unit)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.margins(x=0.02)
        if len([kind for kind, (steps, _) in data.items() if steps]) > 1:
            axes.legend(frameon=False, loc="upper right")
        _trim(axes, [value for _, values in data.values() for value in values])
    return figure


def _curve(axes: Axes, kind: str, steps: list[int], values: list[float]) -> None:
    if kind == "eval":
        axes.plot(steps, values, color=HELD_OUT, marker="o", markersize=4, linewidth=1.5, label="held-out")
        return
    axes.plot(steps, values, color=TRAIN, linewidth=0.8, alpha=0.3)
    memory = max(0.0, 1 - 20 / max(len(values), 1))
    axes.plot(steps, smooth(values, memory), color=TRAIN, linewidth=1.8, label="train")


def _trim(axes: Axes, values: list[float]) -> None:
    """Let a few values that lie far above the rest leave the frame, so that the rest can be read."""
    ordered = sorted(values)
    low, high = ordered[0], ordered[int(0.97 * (len(ordered) - 1))]
    if ordered[-1] - low > 2 * (high - low):
        pad = 0.08 * (high - low or 1.0)
        axes.set_ylim(low - pad, high + pad)


def write_plots(folder: Path, rows: Rows) -> dict[str, str]:
    """Write plots/NAME.svg and .png; returns the SVG of each as text."""
    target = folder / "plots"
    target.mkdir(exist_ok=True)
    drawn = {}
    for plot in PLOTS:
        figure = draw(plot, rows)
        if figure is None:
            continue
        with rc_context(STYLE):
            text = io.StringIO()
            figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
            figure.savefig(target / f"{plot.name}.png", dpi=150, facecolor="white")
        drawn[plot.name] = text.getvalue()
        (target / f"{plot.name}.svg").write_text(drawn[plot.name])
    return drawn
