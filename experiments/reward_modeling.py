"""Reward modelling with noisy preferences (arXiv 2401.06080): what strength finds, what the cures and MetaRM bring.

    python -m experiments.reward_modeling [--smoke] [--out FOLDER] [--pairs HH.jsonl.gz] [--votes PANDALM.jsonl.gz]

vectors: pairs of vectors whose true order is known, with 0 to 40 % of the labels flipped. How well the strength of an
ensemble ranks the flips, in-sample and out-of-fold; accuracy of each cure on clean pairs and under a shift; at 0 %,
what flipping costs that was not needed. meta: MetaRM under a shift, with a step of length 0, along a random direction,
by answers that are not shifted, and downwards. digits: the same as vectors with transformers on digit strings, and with
contrastive terms. Then real pairs, if files are named: planted flips, and three votes of people.

Prints tables; writes results.json and reward_modeling.svg. Expect about 5 minutes of processor time.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from matplotlib.axes import Axes

from experiments.results import carry_out
from experiments.reward_digits import CONTRASTS, run_digits
from experiments.reward_meta import ARMS, run_meta
from experiments.reward_pairs import read_split, read_votes, run_pairs, run_votes
from experiments.reward_pilot import CURED_RATES, run_pilot
from experiments.reward_tables import digits_table, meta_table, pairs_table, pilot_tables, votes_table
from lmlab.cli import exit_code
from lmlab.core.errors import check
from lmlab.report.folder import open_folder
from lmlab.report.plots import drawing

NAME = "python -m experiments.reward_modeling"
SMOKE_ARMS = ("eta 0", "eta 0.3, random direction")
PARTS = ("vectors", "meta", "digits", "pairs", "votes")


@dataclass(frozen=True)
class Options:
    """Plant wrong labels, find them, and train reward models in spite of them."""

    out: str = "runs/reward_modeling"
    """Where results.json and the figure go."""
    pairs: str = ""
    """Real pairs, .jsonl or .jsonl.gz with a field "split"; empty: this part is skipped."""
    votes: str = ""
    """Answers with three votes, .jsonl.gz of PandaLM; empty: this part is skipped."""
    only: str = ""
    """vectors, meta, digits, pairs or votes: that part alone."""
    smoke: bool = False
    """A few epochs on a few pairs, to see that it runs."""
    seeds: int = 3
    """Data and trainings of each arm."""
    vectors: int = 4000
    """Pairs of vectors."""
    epochs: int = 40
    """Epochs on them; measured after 1, 5, 10, 20 and 40."""
    meta_epochs: int = 6
    digits: int = 1000
    """Pairs of digit strings."""
    digit_epochs: int = 8


def check_options(options: Options) -> None:
    """Raise `UserError` where something is wrong with them."""
    check(options.only in ("", *PARTS), "--only", options.only, " or ".join(PARTS))
    for name in ("pairs", "votes"):
        path = getattr(options, name)
        check(options.only != name or bool(path), f"--{name}", path, "a file")
        check(not path or Path(path).is_file(), f"--{name}", path, "a file that is there")
    check(not options.votes or options.votes.endswith(".jsonl.gz"), "--votes", options.votes, "a file .jsonl.gz")
    sizes = {"seeds": 1, "vectors": 200, "epochs": 5, "meta_epochs": 1, "digits": 50, "digit_epochs": 1}
    for name, least in sizes.items():
        value = getattr(options, name)
        check(value >= least, f"--{name.replace('_', '-')}", value, f"at least {least}")


def run(options: Options) -> dict[str, Any]:
    """All parts, or the one that is asked for."""
    check_options(options)
    if options.smoke:
        options = replace(options, seeds=2, vectors=200, epochs=5, meta_epochs=1, digits=64, digit_epochs=1)
    arms, contrasts = (SMOKE_ARMS, CONTRASTS[-1:]) if options.smoke else (tuple(ARMS), CONTRASTS)
    wanted = lambda name: options.only in ("", name)
    # Files are read before anything is trained.
    pairs = read_split(options.pairs) if options.pairs and wanted("pairs") else None
    votes = read_votes(options.votes) if options.votes and wanted("votes") else None
    open_folder(Path(options.out))
    skipped = lambda name: {"skipped": f"no file was named (--{name})"}
    parts: dict[str, Callable[[], Any]] = {
        "vectors": lambda: run_pilot(options.seeds, options.vectors, options.epochs),
        "meta": lambda: run_meta(options.seeds, options.vectors, options.meta_epochs, arms),
        "digits": lambda: run_digits(options.seeds, options.digits, options.digit_epochs, contrasts),
        "pairs": lambda: run_pairs(pairs, options.seeds) if pairs else skipped("pairs"),
        "votes": lambda: run_votes(votes, options.seeds) if votes else skipped("votes"),
    }
    return {"options": asdict(options)} | {name: part() for name, part in parts.items() if wanted(name)}


def table(result: dict[str, Any]) -> str:
    """All that was found, as text."""
    show = dict(zip(PARTS, (pilot_tables, meta_table, digits_table, pairs_table, votes_table), strict=True))
    found = [name for name in PARTS if name in result]
    skipped = lambda name: isinstance(result[name], dict) and "skipped" in result[name]
    return "\n\n".join(
        f"{name}: skipped, {result[name]['skipped']}" if skipped(name) else show[name](result[name]) for name in found
    )


def draw(result: dict[str, Any], path: Path) -> None:
    """Accuracy by epoch: of some cures of vectors for each rate of flips, and of all of digit strings."""
    panels: list[Callable[[Axes], None]] = []
    if "vectors" in result:
        panels += [lambda axes, rate=f"{rate:g}": draw_cures(axes, result["vectors"], rate) for rate in CURED_RATES]
    if "digits" in result:
        panels.append(lambda axes: draw_digits(axes, result["digits"]))
    if not panels:
        return
    with drawing(path, 4.5 * len(panels), 4) as drawn:
        for panel, axes in zip(panels, drawn.subplots(1, len(panels), squeeze=False)[0], strict=True):
            panel(axes)
        if "vectors" in result:
            drawn.legend(*drawn.axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=7, fontsize=8)


DRAWN = ("nothing", "true labels", "flip lowest 10 %", "smooth all, 0.2", "margin mu", "posterior",
         "unbiased, estimated rate")  # fmt: skip


def draw_cures(axes: Axes, seeds: list[dict[str, Any]], rate: str) -> None:
    """Mean and standard deviation over seeds."""
    for name in DRAWN:
        curves = [seed["cures"][rate][name]["test"] for seed in seeds]
        _curve(axes, name, [int(epoch) for epoch in curves[0]], [list(curve.values()) for curve in curves])
    axes.set_title(f"vectors, {float(rate):.0%} flipped", loc="left")
    axes.set(xlabel="epoch", ylabel="accuracy on clean pairs", xscale="log")
    axes.set_xticks(list(map(int, curves[0])), labels=list(curves[0]), minor=False)
    axes.minorticks_off()


def draw_digits(axes: Axes, seeds: list[dict[str, Any]]) -> None:
    """Mean and standard deviation over seeds."""
    for name in seeds[0]["accuracy"]:
        curves = [seed["accuracy"][name] for seed in seeds]
        _curve(axes, name, list(range(1, len(curves[0]) + 1)), curves)
    axes.set_title("digit strings, 20 % flipped", loc="left")
    axes.set(xlabel="epoch", ylabel="accuracy on clean pairs")
    axes.legend(fontsize=8)


def _curve(axes: Axes, name: str, epochs: list[int], curves: list[list[float]]) -> None:
    values = np.asarray(curves)
    spread = values.std(axis=0, ddof=1) if len(values) > 1 else None
    axes.errorbar(epochs, values.mean(axis=0), spread, fmt="-o", label=name, capsize=2, markersize=4)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code, as `lmlab` does."""
    return exit_code(
        lambda: carry_out(tyro.cli(Options, prog=NAME, args=argv), run, draw, table, "reward_modeling.svg"), NAME
    )


if __name__ == "__main__":
    sys.exit(main())
