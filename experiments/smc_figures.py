"""What the runs of the small model have found, as text and as panels."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.smc_words import MASKED, TOKENS


def words_table(found: dict[str, Any]) -> str:
    """What is printed."""
    exact, floor = found["exact"], found["floor"]
    shown = ", ".join(f"{one['log_evidence']:.3f} ±{one['error']:.3f}" for one in exact)
    kinds = list(floor)
    lines = [
        f"exact texts of each prompt: {', '.join(str(one['accepted']) for one in exact)}; log Z {shown}",
        "distance by chance: " + "; ".join(
            f"{kind} {floor[kind]['halves']:.3f} of halves, {floor[kind]['one text a run']:.3f} of one text a run"
            for kind in kinds
        ),
        f"{'':32s}{'N':>4s}{'rows':>6s}{'log Z-hat - log Z':>20s}{'dead':>6s}{'Z-hat / Z':>16s}{'log-prob':>15s}"
        + "".join(f"{kind:>15s}" for kind in kinds) + f"{'ancestors':>11s}{'texts':>7s}",
    ]  # fmt: skip
    for name, arm in found["arms"].items():
        for particles, one in arm.items():
            lines.append(f"{name:32s}{particles:>4s}{int(particles) * TOKENS:6d}{_evidence_cells(one):42s}"
                         + _quality_cells(one, kinds)
                         + (f"{one['ancestors']:11.2f}{one['texts']:7.2f}" if "texts" in one else ""))  # fmt: skip
    return "\n".join(lines)


def _evidence_cells(one: dict[str, Any]) -> str:
    if "ratio" not in one:
        return ""
    gap = "-inf" if one["log_gap"] is None else f"{one['log_gap']:.3f} ±{one['log_gap_error']:.3f}"
    return f"{gap:>20s}{one['dead']:6.0%}{one['ratio']:9.3f} ±{one['ratio_error']:5.3f}"


def _quality_cells(one: dict[str, Any], kinds: Sequence[str]) -> str:
    if one["log_prob_gap"] is None:
        return f"{'no text':>15s}" + f"{'':15s}" * len(kinds)
    gap = f"{one['log_prob_gap']:8.2f} ±{one['log_prob_error']:5.2f}"
    return gap + "".join(f"{one['far'][kind]:15.3f}" for kind in kinds)


STYLES = {
    "importance": ("#999999", "v"), "standard": ("#0072B2", "o"), "steering": ("#D55E00", "s"),
    "multinomial": ("#009E73", "^"), "multinomial each round": ("#CC79A7", "D"), MASKED: ("#000000", "x"),
}  # fmt: skip
"""Colour and mark of each driver; lines are whole with the optimal proposal, broken with the plain one."""


def draw_words(found: dict[str, Any], figure: Figure) -> None:
    """Evidence, log-probability, distance and ancestors against the number of particles, in four panels."""
    evidence, log_prob, far, lines = panels = list(figure.subplots(2, 2).flat)
    error = math.hypot(*(one["error"] for one in found["exact"])) / len(found["exact"])
    _curves(
        evidence, found, lambda name: "multinomial" not in name, lambda x: (x.get("log_gap"), x.get("log_gap_error"))
    )
    evidence.axhspan(-error, error, color="#666666", alpha=0.3)
    evidence.set(ylabel="nats", title="Mean log Z-hat less log Z")
    texts = lambda name: "multinomial" not in name and name != "importance, plain"
    _curves(log_prob, found, texts, lambda x: (x["log_prob_gap"], x["log_prob_error"]))
    log_prob.axhline(0, color="#666666", linewidth=0.8)
    log_prob.set(ylabel="nats above exact texts", title="Log-probability of a text")
    _curves(far, found, texts, lambda x: (x["far"].get("first letters"), 0))
    far.axhline(found["floor"]["first letters"]["one text a run"], color="#666666", linewidth=0.8, linestyle=":")
    far.set(ylabel="total variation", title="Letters of the first word")
    resampled = lambda name: name.endswith("optimal") and "importance" not in name
    _curves(lines, found, resampled, lambda x: (x["ancestors"], 0))
    lines.set(ylabel="of the particles of round 1", title="Ancestors at the end")
    legend(figure, panels)


def _curves(
    axes: Axes, found: dict[str, Any], shown: Callable[[str], bool],
    value: Callable[[dict[str, Any]], tuple[float | None, float | None]],
) -> None:  # fmt: skip
    for name, arm in found["arms"].items():
        points = [(int(particles), *value(one)) for particles, one in arm.items()] if shown(name) else []
        points = [point for point in points if point[1] is not None]
        if points:
            driver, _, proposal = name.partition(", ")
            color, marker = STYLES[driver]
            line = "--" if proposal == "plain" else "-"
            axes.errorbar(*zip(*points, strict=True), color=color, marker=marker, linestyle=line, label=name,
                          capsize=2, markersize=4, linewidth=1.2)  # fmt: skip
    sizes = [int(particles) for particles in found["arms"][MASKED]]
    axes.set_xscale("log", base=2)
    axes.set(xticks=sizes, xticklabels=sizes, xlabel="particles")


def legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """One legend beside all panels, each name once."""
    found = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(found.values(), found, loc="outside right upper", fontsize=8, frameon=False)
