"""report.html of a steering run."""

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from lmlab.core.serialize import CLASS, to_json
from lmlab.inference.posterior import WeighedText
from lmlab.inference.text import TextCodec, encode_prompts
from lmlab.report.page import inline_svg, page_template
from lmlab.report.plots import HELD_OUT, INK, STYLE, TRAIN
from lmlab.steering.config import Steer
from lmlab.steering.layout import MOST_COLUMNS, MOST_ROWS
from lmlab.steering.rounds import Outcome
from lmlab.steering.told import anew_label, failure, meaning, number, plain, speed
from lmlab.steering.tree import draw_tree

FIRST, SHOWN = 10, 200
"""Texts that are seen at once, and all that are on the page."""


def render_page(outcome: Outcome, codec: TextCodec, args: Steer) -> str:
    """The page. Texts are escaped."""
    tree = draw_tree(outcome, codec, encode_prompts(codec, args.prompt)[0])
    # Texts of any model stand in a script: none may end it.
    data = json.dumps({"prompt": outcome.prompts[0], "columns": tree.nodes, "pieces": tree.pieces}, allow_nan=False)
    plots = {"log Z": evidence_plot, "Effective size": size_plot, "Weights": weights_plot}
    drawn = [(title, Markup(inline_svg(_svg(plot, outcome, args), plot.__name__))) for title, plot in plots.items()]
    texts = _texts(outcome)
    return page_template("steering.html.jinja").render(
        name=Path(args.model).resolve().name, program=args.program, prompts=outcome.prompts,
        tiles=_tiles(outcome, args), status=_status(outcome, args), caution=failure(outcome, args),
        meaning=meaning(outcome, args), texts=texts[:FIRST], others=texts[FIRST:SHOWN], more=len(texts) - SHOWN,
        tree=tree, svg=Markup(tree.svg), cut=_cut(outcome), marks=args.method == "smc",
        data=Markup(data.replace("<", "\\u003c")), plots=drawn,
        settings=[(field, json.dumps(value)) for field, value in to_json(args).items() if field != CLASS],
    )  # fmt: skip


def _texts(outcome: Outcome) -> list[tuple[WeighedText, str, float]]:
    """Texts, their probability, and the length of its bar in percent."""
    top = max((one.probability for one in outcome.posterior), default=1.0)
    return [(one, f"{one.probability:.3f}", 100 * one.probability / top) for one in outcome.posterior]


def _status(outcome: Outcome, args: Steer) -> str:
    rounds = len(outcome.rounds)
    how = "SMC steering" if args.method == "steer" else f"SMC, {args.scheme} at {args.threshold:g}"
    end = f"stopped by {outcome.stopped_by} after" if outcome.stopped_by else "over after"
    return f"{args.particles} particles, {how}; {end} {rounds} round{'s' if rounds > 1 else ''}"


def _tiles(outcome: Outcome, args: Steer) -> list[tuple[str, str]]:
    """Key figures as (label, text)."""
    finished = int(np.sum(outcome.finished_P & (outcome.share_P > 0)))
    tiles = [
        (f"log Z (Z = {plain(outcome.log_evidence):.3g})", number(outcome.log_evidence)),
        ("effective size", f"{outcome.effective:.1f} of {args.particles}"),
        ("different texts", f"{len(outcome.posterior)}"),
        ("finished particles that count", f"{finished}"),
        (anew_label(args), f"{sum(outcome.anew)} of {len(outcome.rounds)}"),
        ("tokens per second, all particles", speed(outcome)),
    ]
    return [(label, text) for label, text in tiles if text]


def _cut(outcome: Outcome) -> str:
    """What of the tree is not drawn."""
    said = []
    if len(outcome.share_P) > MOST_ROWS:
        said.append(f"the {MOST_ROWS} heaviest particles of a round, with their ancestors, of {len(outcome.share_P)}")
    if len(outcome.rounds) > MOST_COLUMNS:
        said.append(f"the first {MOST_COLUMNS} rounds of {len(outcome.rounds)}")
    return f"Drawn are {' and '.join(said)}; trace.json has all." if said else ""


def _svg(plot: Any, outcome: Outcome, args: Steer) -> str:
    with rc_context(STYLE):
        figure = Figure(figsize=(6, 3.2), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        plot(axes, outcome, args)
        axes.set_xlabel("round")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return text.getvalue()


def evidence_plot(axes: Axes, outcome: Outcome, args: Steer) -> None:
    """The estimate of log Z after each round."""
    del args
    values = [one.log_evidence if math.isfinite(one.log_evidence) else math.nan for one in outcome.rounds]
    axes.plot(np.arange(1, len(values) + 1), values, color=TRAIN, linewidth=1.8, marker="o", markersize=2.5)
    axes.set_title("log Z so far", loc="left", fontsize=12, fontweight="bold")
    axes.set_ylabel("nats")


def size_plot(axes: Axes, outcome: Outcome, args: Steer) -> None:
    """The effective number of particles, or of children, with marks where they were drawn anew."""
    rounds = np.arange(1, len(outcome.rounds) + 1)
    steer = args.method == "steer"
    size_T = np.asarray(outcome.child_effective_T)
    axes.plot(rounds, size_T, color=TRAIN, linewidth=1.8, label="children" if steer else "particles")
    if steer:
        kept = [one.effective for one in outcome.rounds]
        axes.plot(rounds, kept, color=HELD_OUT, linewidth=1.4, label="those that went on")
    else:
        anew = np.asarray(outcome.anew)
        axes.plot(rounds[anew], size_T[anew], "o", color=HELD_OUT, markersize=4, label="drawn anew")
        axes.axhline(args.threshold * args.particles, color=INK, linewidth=0.8, linestyle="--")
    axes.set_title("Effective size before the choice", loc="left", fontsize=12, fontweight="bold")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, loc="best")


def weights_plot(axes: Axes, outcome: Outcome, args: Steer) -> None:
    """The spread of the weights of living particles, 1 where all weigh the same."""
    share_TP = np.stack([one.share_P for one in outcome.rounds]) * args.particles
    some = [row[row > 0] if (row > 0).any() else np.asarray([np.nan]) for row in share_TP]
    rounds = np.arange(1, len(some) + 1)
    low, half, high = (np.asarray([np.quantile(row, q) for row in some]) for q in (0, 0.5, 1))
    axes.fill_between(rounds, low, high, color=TRAIN, alpha=0.2, linewidth=0, label="lightest to heaviest")
    axes.plot(rounds, half, color=TRAIN, linewidth=1.8, label="median")
    axes.plot(rounds, high, color=TRAIN, linewidth=0.8)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_title("Weights of living particles, times their number", loc="left", fontsize=12, fontweight="bold")
    axes.legend(frameon=False, loc="best")
