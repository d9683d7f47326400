"""`lmlab order`: an order of related documents, made and measured beside random and cluster order."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from lmlab.core.errors import UserError
from lmlab.recipe import RUNS, Pretrain


@dataclass(frozen=True)
class Order:
    """Put the documents of a recipe in an order of related ones, as training with it would, and tell how good it is."""

    recipe: tyro.conf.Positional[str]
    """A Python file with a function recipe(), or the name of one in ./configs."""
    out: str = ""
    """Folder for order.svg and order.json; empty: runs/NAME-order."""
    config: Annotated[Pretrain, tyro.conf.arg(name="")] = field(default_factory=Pretrain)


@dataclass(frozen=True)
class Measured:
    """What is told of the documents of one source."""

    counts: dict[str, Any]
    """Documents, copies, held-out ones, edges, parts."""
    orders: dict[str, dict[str, float]]
    """Quality by order, see `lmlab.data.path_quality`."""
    steps: dict[str, Any]
    """Arrays: similarity of each document with the one before it, by order."""


def order(args: Order) -> int:
    """Print the table, and write it and the plot."""
    from lmlab.data.folders import write_atomically

    folder = Path(args.out) if args.out else RUNS / f"{Path(args.recipe).stem}-order"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError("--out", str(folder), f"a folder that can be written ({error.strerror})") from error
    found = measure_orders(args.config)
    say(table(found))
    record = {name: {**measured.counts, "orders": measured.orders} for name, measured in found.items()}
    try:
        write_atomically(folder / "order.json", json.dumps(record, indent=1))
        draw(found, folder / "order.svg")
    except OSError as error:
        raise UserError("--out", str(folder), f"a folder that can be written ({error.strerror})") from error
    say(f"\nplot    {(folder / 'order.svg').resolve()}")
    return 0


def measure_orders(config: Pretrain) -> dict[str, Measured]:
    """The order that the recipe's `data.in_context` describes, and two to compare, of every source.

    Raises:
        UserError: as `open_data`.
    """
    from lmlab.data.folders import cache_root
    from lmlab.data.in_context import related_documents
    from lmlab.data.open import open_data
    from lmlab.data.vectors import corpus_of

    settings = replace(config.data, order="in_context")
    data = open_data(settings)
    found = {}
    for name, made in data.orders.items():
        caches = {split: by_source[name] for split, by_source in data.caches.items()}
        train, heldout = (corpus_of(cache, data.tokenizer, f"{name}/{split}") for split, cache in caches.items())
        related = related_documents(settings.in_context, train, cache_root(settings.cache_dir), heldout=heldout)
        found[name] = _measure(related, made.documents, settings.in_context.tour, settings.seed, made.report)
    return found


def _measure(related: Any, documents: Any, name: str, seed: int, report: Mapping[str, Any]) -> Measured:
    import numpy as np

    from lmlab.data.baselines import cluster_order
    from lmlab.data.path_quality import path_quality, step_similarities

    rng = np.random.default_rng(seed)
    paths = {
        "clusters": cluster_order(related.vectors_nD, rng),
        "random": rng.permutation(len(related.kept)),
    }
    # The order itself first, and in place of one to compare with if it is of that kind.
    paths = {name: np.searchsorted(related.kept, documents)} | {k: v for k, v in paths.items() if k != name}
    counts = {key: report[key] for key in ("documents", "held_out", "copies", "ordered", "edges", "components")}
    return Measured(
        counts,
        {key: path_quality(path, related.graph, related.vectors_nD) for key, path in paths.items()},
        {key: step_similarities(path, related.vectors_nD) for key, path in paths.items()},
    )


def table(found: Mapping[str, Measured]) -> str:
    """The quality of every order of every source."""
    lines = []
    for name, measured in found.items():
        counts = measured.counts
        gone = counts["copies"] / counts["documents"]
        lines += [
            f"{name}: {counts['documents']:,} documents, {counts['copies']:,} copies ({gone:.1%}) and "
            f"{counts['held_out']:,} near held-out ones left out, {counts['edges']:,} edges, "
            f"{counts['components']:,} parts",
            f"  {'order':14s} {'similarity':>10s} {'jumps':>7s} {'of bound':>9s}",
        ]
        for kind, quality in measured.orders.items():
            lines.append(f"  {kind:14s} {quality['similarity']:10.3f} {quality['jumps']:7.1%} {quality['ratio']:9.3f}")
    return "\n".join(lines)


def draw(found: Mapping[str, Measured], path: Path) -> None:
    """How alike neighbours are in each order: a panel for each source."""
    from lmlab.report.plots import HELD_OUT, INK, TRAIN, drawing

    with drawing(path, 6, 3.2 * len(found)) as figure:
        panels = figure.subplots(len(found), 1, squeeze=False)[:, 0]
        for axes, (name, measured) in zip(panels, found.items(), strict=True):
            for (kind, steps), colour in zip(measured.steps.items(), (TRAIN, HELD_OUT, INK), strict=False):
                axes.hist(steps, bins=50, range=(-0.1, 1), histtype="step", color=colour, linewidth=1.5, label=kind)
            axes.set_title(f"{name}: neighbours in the order", loc="left", fontsize=12, fontweight="bold")
            axes.set(xlabel="cosine with the document before", ylabel="documents")
            axes.legend(frameon=False)


def say(text: str) -> None:
    """One piece of the result on standard output."""
    print(text)
