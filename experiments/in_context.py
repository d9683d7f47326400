"""In-Context Pretraining beside random order, with attention across documents and without (arXiv 2310.10638).

    python -m experiments.in_context [--smoke] [--out FOLDER] [--text POSTS.jsonl.gz]

First a corpus of topics: each is a map of 6 of 16 keys to 16 values, and each of its 8 documents holds 4 of the pairs.
A small transformer learns to look a value up in an earlier document of its window, or does not: four arms, {random,
related} order x {row, document} attention, on the same documents. The loss on values is told by the document's place in
windows of four documents of topics that were never seen. Chance is ln 16 = 2.773; only related order with attention
across documents should get below it, from the second document on.

Then real text, if a file is named (20 Newsgroups: one post a line, fields "text" and "group"): how alike neighbours are
in every kind of order, for tf-idf and for MiniLM where it is installed; and the same four arms on a language model, by
held-out loss on rows of related posts and of posts at random.

Prints tables; writes results.json and in_context.svg. Expect about 6 minutes for the first part on two CPU cores.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from matplotlib.axes import Axes

from experiments.in_context_text import run_text, text_config
from experiments.in_context_topics import VALUES, WINDOW, run_topics
from experiments.results import carry_out, say
from lmlab.cli import exit_code
from lmlab.core.errors import check
from lmlab.report.plots import drawing

NAME = "python -m experiments.in_context"


@dataclass(frozen=True)
class Options:
    """Train on related documents and on random ones, with attention across documents and without."""

    out: str = "runs/in_context"
    """Where results.json and the figure go."""
    text: str = ""
    """Posts, .jsonl or .jsonl.gz with fields "text" and "group"; empty: the second part is skipped."""
    only: str = ""
    """topics or text: that part alone."""
    smoke: bool = False
    """A few steps on a few documents, to see that it runs."""
    seeds: int = 3
    """Corpora and trainings of each arm in the first part."""
    topics: int = 4000
    """With few topics the model learns them by heart, and the effect drowns."""
    steps: int = 1000
    """Steps of an arm in the first part."""
    text_steps: int = 250
    """In the second."""
    text_seeds: int = 1
    """Trainings of each arm in the second part."""


def run(options: Options) -> dict[str, Any]:
    """Both parts, or the one that is asked for."""
    check(options.only in ("", "topics", "text"), "--only", options.only, "topics or text")
    check(options.only != "text" or bool(options.text), "--text", options.text, "a file of posts")
    names = (".jsonl", ".jsonl.gz")
    check(not options.text or (Path(options.text).is_file() and options.text.endswith(names)), "--text", options.text,
          f"a file of posts, {' or '.join(names)}")  # fmt: skip
    for name in ("seeds", "topics", "steps", "text_steps", "text_seeds"):
        check(getattr(options, name) >= 1, f"--{name.replace('_', '-')}", getattr(options, name), "at least 1")
    if options.smoke:
        options = replace(options, seeds=2, topics=40, steps=4, text_steps=2)
    result: dict[str, Any] = {"options": asdict(options)}
    if options.only != "text":
        say("topics")
        result["topics"] = run_topics(options.seeds, options.topics, options.steps)
    if options.text and options.only != "topics":
        say("text")
        result["text"] = run_text(text_config(options.text, options.smoke), options.text_seeds, options.text_steps)
    elif not options.text:
        result["text"] = {"skipped": "no posts were named (--text)"}
    return result


def table(result: dict[str, Any]) -> str:
    """All that was found, as text."""
    show = lambda values: f"{np.mean(values):.3f}" + (f" ±{np.std(values, ddof=1):.3f}" if len(values) > 1 else "")
    lines = []
    if "topics" in result:
        order = {key: float(np.mean([row[key] for row in result["topics"]["order"]])) for key in
                 result["topics"]["order"][0]}  # fmt: skip
        lines += [f"topics, related order: {', '.join(f'{key} {value:.3f}' for key, value in order.items())}",
                  f"loss on values; chance {result['topics']['chance']:.3f}",
                  f"{'order, attention':20s}" + "".join(f"{f'document {i + 1}':>15s}" for i in range(WINDOW))
                  + f"{'answerable':>15s}"]  # fmt: skip
        for name, arm in result["topics"]["arms"].items():
            places = "".join(f"{show(column):>15s}" for column in zip(*arm["by place"], strict=True))
            lines.append(f"{name:20s}{places}{show(arm['answerable']):>15s}")
    if "arms" in result.get("text", {}):
        for encoder, found in result["text"]["orders"].items():
            lines += ["", f"{encoder}: {found.get('skipped') or found['documents']}"]
            for rule, x in found.get("orders", {}).items():
                shown = (f"{key} {x[key]:.3f}" for key in ("similarity", "jumps", "ratio", "same group"))
                lines.append(f"  {rule:22s} {'  '.join(shown)}")
        lines += ["", f"{'held-out nats a token':24s}{'related rows':>18s}{'random rows':>18s}"]
        for name, arm in result["text"]["arms"].items():
            lines.append(f"{name:24s}{show(arm['related']):>18s}{show(arm['random']):>18s}")
    elif "skipped" in result.get("text", {}):
        lines.append(f"text: skipped, {result['text']['skipped']}")
    return "\n".join(lines)


def draw(result: dict[str, Any], path: Path) -> None:
    """A panel for each part: loss by place of the document; on real text held-out loss by arm."""
    panels = {"topics": draw_topics, "text": draw_text}
    parts = [name for name in panels if "arms" in result.get(name, {})]
    with drawing(path, 5 * len(parts), 4) as drawn:
        for name, axes in zip(parts, drawn.subplots(1, len(parts), squeeze=False)[0], strict=True):
            panels[name](axes, result[name]["arms"])


def draw_topics(axes: Axes, arms: dict[str, Any]) -> None:
    """Mean and standard deviation over seeds."""
    for name, arm in arms.items():
        places = np.asarray(arm["by place"])
        spread = places.std(axis=0, ddof=1) if len(places) > 1 else None
        style = "-" if name.endswith("row") else "--"
        axes.errorbar(range(1, WINDOW + 1), places.mean(axis=0), spread, fmt=style + "o", label=name, capsize=2,
                      markersize=4)  # fmt: skip
    axes.axhline(math.log(VALUES), color="#666666", linewidth=0.8)
    axes.set(xlabel="document of the window", ylabel="loss on values, nats", xticks=range(1, WINDOW + 1))
    axes.legend(fontsize=8)


def draw_text(axes: Axes, arms: dict[str, Any]) -> None:
    """Both kinds of held-out rows side by side."""
    for shift, kind in ((-0.2, "related"), (0.2, "random")):
        means = [np.mean(arm[kind]) for arm in arms.values()]
        axes.barh(np.arange(len(means)) + shift, means, 0.35, label=f"{kind} rows")
    lowest = min(np.mean(values) for arm in arms.values() for values in arm.values())
    axes.set(
        yticks=range(len(arms)), yticklabels=list(arms), xlabel="held-out nats a token", xlim=(0.97 * lowest, None)
    )
    axes.legend(fontsize=8)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code, as `lmlab` does."""
    return exit_code(
        lambda: carry_out(tyro.cli(Options, prog=NAME, args=argv), run, draw, table, "in_context.svg"), NAME
    )


if __name__ == "__main__":
    sys.exit(main())
