"""What a trained model has answered, as text and as panels."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
from matplotlib.figure import Figure

from experiments.results import deviation
from experiments.smc_figures import legend

Rows: TypeAlias = Sequence[Sequence[dict[str, Any]]]
"""Answers of an arm, [prompt][seed]."""
Value: TypeAlias = Callable[[dict[str, Any]], float | None]
VALUES: dict[str, Value] = {
    "nats a token": lambda one: one["log_prob"] / one["tokens"] if one["tokens"] else None,
    "nats a text": lambda one: one["log_prob"] if one["tokens"] else None,
    "tokens": lambda one: one["tokens"] or None,
    "log Z-hat": lambda one: one["log_evidence"],
}
"""What is told of the answers that have it."""
STYLES = {
    "unconstrained, best": ("#CC79A7", "D"), "masked, one": ("#000000", "x"), "masked, best": ("#009E73", "^"),
    "importance": ("#999999", "v"), "standard": ("#0072B2", "o"), "steering": ("#D55E00", "s"),
}  # fmt: skip


def prompts_table(found: dict[str, Any]) -> str:
    """Means over prompts and seeds, and the deviation of seeds; of log Z-hat those that are finite."""
    lines = []
    for constraint, arms in found.items():
        lines += ["", f"{constraint:28s}{'done':>6s}" + "".join(f"{name:>16s}" for name in VALUES)
                  + f"{'-inf':>6s}{'rows':>6s}{'seconds':>9s}"]  # fmt: skip
        for name, rows in arms.items():
            flat = [one for row in rows for one in row]
            done = np.mean([one["tokens"] > 0 for one in flat])
            lost = "" if name == "masked, best" else f"{np.mean([one['log_evidence'] is None for one in flat]):.0%}"
            cells = "".join(f"{_cell(*over_seeds(rows, value)):>16s}" for value in VALUES.values())
            lines.append(f"{name:28s}{done:6.0%}{cells}{lost:>6s}{np.mean([one['rows'] for one in flat]):6.0f}"
                         f"{np.median([one['seconds'] for one in flat]):9.2f}")  # fmt: skip
    return "\n".join(lines)


def over_seeds(rows: Rows, value: Value) -> tuple[float | None, float]:
    """Mean, and deviation over seeds of the mean over prompts, of what has a value; None if nothing has."""
    columns = [[x for one in column if (x := value(one)) is not None] for column in zip(*rows, strict=True)]
    every = [x for column in columns for x in column]
    return (float(np.mean(every)), deviation([np.mean(x) for x in columns if x])) if every else (None, 0.0)


def _cell(mean: float | None, spread: float) -> str:
    return "-" if mean is None else f"{mean:.2f} ±{spread:5.2f}"


def draw_prompts(found: dict[str, Any], figure: Figure) -> None:
    """The mean of log Z-hat, and log-probability a token, of each arm under each constraint, in two panels."""
    panels = list(figure.subplots(1, 2, sharey=True))
    for axes, key in zip(panels, ("log Z-hat", "nats a token"), strict=True):
        for place, arms in enumerate(found.values()):
            for shift, (name, rows) in enumerate(arms.items()):
                mean, spread = over_seeds(rows, VALUES[key])
                # Where draws have failed there is no mean of log Z-hat.
                lost = key == "log Z-hat" and any(VALUES[key](one) is None for row in rows for one in row)
                if mean is not None and not lost:
                    color, marker = STYLES[name]
                    axes.errorbar(mean, place + 0.11 * (shift - 2.5), xerr=spread, color=color, marker=marker,
                                  linestyle="", capsize=2, markersize=5, label=name)  # fmt: skip
        axes.set(yticks=range(len(found)), yticklabels=list(found), ylim=(len(found) - 0.5, -0.5), title=key)
    legend(figure, panels[1:])
