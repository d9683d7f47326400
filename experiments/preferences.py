"""DPO where its optimum is known, where the reward is known, and on real pairs (arXiv 2305.18290).

    python -m experiments.preferences [--smoke] [--out FOLDER] [--pairs PAIRS.jsonl.gz]

A table of six answers: descent on the expected loss has to end at reference * exp(reward / beta) / Z; with 20% of the
labels turned round plain and conservative DPO end elsewhere, the robust loss does not. A language of Markov chains
whose strings have a known reward: from the same model and the same pairs every arm goes its way, told by mean true
reward and KL from the reference, beside the curve of the optima that no policy can be above. And if a file is named,
real pairs (such as Anthropic's HH): a small model learns the dialogues, then the preferences; accuracy of the implicit
reward on held-out pairs, and KL from the reference by sampling, beside the same with shuffled labels.

Prints tables; writes results.json and preferences.svg.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from matplotlib.axes import Axes

from experiments.preferences_grammar import run_grammar
from experiments.preferences_language import Sizes
from experiments.preferences_real import RealSizes, run_real
from experiments.preferences_table import run_table
from experiments.results import carry_out, deviation, say
from lmlab.cli import exit_code
from lmlab.core.errors import check
from lmlab.report.plots import drawing

NAME = "python -m experiments.preferences"


@dataclass(frozen=True)
class Options:
    """Train on pairs whose optimum, or whose reward, is known; and on real ones."""

    out: str = "runs/preferences"
    """Where results.json and the figure go."""
    pairs: str = ""
    """Real pairs, .jsonl or .jsonl.gz (see experiments.dpo); a field "split" = "test" marks held-out ones. Empty: that
    part is skipped."""
    only: str = ""
    """table, grammar or real: that part alone."""
    smoke: bool = False
    """A few steps on a few pairs, to see that it runs."""
    seeds: int = 3
    """Problems and trainings of each arm."""
    known_pairs: int = 3000
    """Pairs of the language."""
    language_steps: int = 500
    """Steps in which the language's model is made."""
    steps: int = 300
    """Steps of an arm."""
    rate: float = 5e-4
    """Peak rate of the arms."""
    real_language_steps: int = 300
    """The same on real pairs."""
    real_steps: int = 100
    real_rate: float = 3e-4


def run(options: Options) -> dict[str, Any]:
    """The parts that are asked for."""
    check(options.only in ("", "table", "grammar", "real"), "--only", options.only, "table, grammar or real")
    check(options.only != "real" or bool(options.pairs), "--pairs", options.pairs, "a file of pairs")
    check(not options.pairs or Path(options.pairs).is_file(), "--pairs", options.pairs, "a file of pairs")
    for name in ("seeds", "known_pairs", "language_steps", "steps", "real_language_steps", "real_steps"):
        check(getattr(options, name) >= 1, f"--{name.replace('_', '-')}", getattr(options, name), "at least 1")
    for name in ("rate", "real_rate"):
        check(getattr(options, name) > 0, f"--{name.replace('_', '-')}", getattr(options, name), "a positive rate")
    if options.smoke:
        options = replace(options, seeds=2, known_pairs=60, language_steps=2, steps=2, real_language_steps=2,
                          real_steps=1)  # fmt: skip
    result: dict[str, Any] = {"options": asdict(options)}
    wanted = lambda part: options.only in ("", part)
    if wanted("table"):
        say("table")
        result["table"] = run_table(options.seeds)
    if wanted("grammar"):
        sizes = Sizes(options.seeds, options.known_pairs, options.language_steps, options.steps, options.rate)
        result["grammar"] = run_grammar(sizes)
    if wanted("real") and options.pairs:
        real = RealSizes(options.seeds, 300 if options.smoke else 1024, options.real_language_steps,
                         options.real_steps, options.real_rate)  # fmt: skip
        result["real"] = run_real(options.pairs, real)
    return result


def _show(values: Sequence[float]) -> str:
    return f"{np.mean(values):.3f} ±{deviation(values):.3f}"


def table(result: dict[str, Any]) -> str:
    """All that was found, as text."""
    lines = []
    if "table" in result:
        lines += ["table: total variation to the optimum", f"  {'reference':28s} {_show(result['table']['before'])}"]
        lines += [f"  {name:28s} {_show(values)}" for name, values in result["table"]["after"].items()]
    if "grammar" in result:
        found = result["grammar"]
        lines += ["", f"{'known reward':30s} {'reward':>15s} {'KL':>15s} {'held-out accuracy':>18s}"]
        lines.append(f"  {'reference':28s} {_show(found['reference']['reward']):>15s}")
        lines += [f"  {name:28s} {_show(arm['reward']):>15s} {_show(arm['kl']):>15s} {_show(arm['accuracy']):>18s}"
                  for name, arm in found["arms"].items()]  # fmt: skip
    if "real" in result:
        found = result["real"]
        lines += ["", f"{found['pairs']} real pairs, {found['held out']} held out: standard error of an accuracy "
                  f"{0.5 / found['held out'] ** 0.5:.3f}", f"{'':30s} {'accuracy':>15s} {'KL':>15s}"]  # fmt: skip
        lines += [f"  {name:28s} {_show(arm['accuracy']):>15s} {_show(arm['kl']):>15s}"
                  for name, arm in found["arms"].items()]  # fmt: skip
    return "\n".join(lines)


def draw(result: dict[str, Any], path: Path) -> None:
    """Frontiers: what is reached against the divergence that it took."""
    panels = {"grammar": ("reward", "mean true reward"), "real": ("accuracy", "held-out accuracy")}
    parts = [part for part in panels if part in result]
    if not parts:
        return
    with drawing(path, 5.5 * len(parts), 4.2) as figure:
        for part, axes in zip(parts, figure.subplots(1, len(parts), squeeze=False)[0], strict=True):
            key, label = panels[part]
            draw_frontier(axes, result[part]["arms"], key)
            axes.set(xlabel="KL(policy || reference), nats an answer", ylabel=label)
            if part == "grammar":
                optima = result[part]["optima"]
                axes.plot([p["kl"] for p in optima], [p["reward"] for p in optima], color="#666666", label="optima")
                axes.plot([0], [np.mean(result[part]["reference"]["reward"])], "k*", label="reference")
            else:
                axes.axhline(0.5, color="#666666", linewidth=0.8)
            axes.legend(fontsize=7, frameon=False)


def draw_frontier(axes: Axes, arms: dict[str, Any], key: str) -> None:
    """A point with its spread over seeds for each arm; those of a beta sweep are joined."""
    sweep = [name for name in arms if name.startswith("DPO") and "," not in name]
    mean = lambda name, what: float(np.mean(arms[name][what]))
    axes.plot([mean(name, "kl") for name in sweep], [mean(name, key) for name in sweep], color="#0072B2", alpha=0.5)
    for name, arm in arms.items():
        marker = "o" if name in sweep else "s"
        axes.errorbar(mean(name, "kl"), mean(name, key), deviation(arm[key]), deviation(arm["kl"]), fmt=marker,
                      label=name, capsize=2, markersize=4)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code, as `lmlab` does."""
    return exit_code(
        lambda: carry_out(tyro.cli(Options, prog=NAME, args=argv), run, draw, table, "preferences.svg"), NAME
    )


if __name__ == "__main__":
    sys.exit(main())
