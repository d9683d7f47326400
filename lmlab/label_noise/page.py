"""What is told of a file of preferences: the summary in the terminal, and report.html."""

import io
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lmlab.label_noise.config import LabelNoise
from lmlab.label_noise.read import Found
from lmlab.label_noise.scores import KINDS, Kind, Verdict
from lmlab.report.page import inline_svg, page_template
from lmlab.report.plots import HELD_OUT, INK, STYLE, TRAIN

WEAK = 0.75
"""An ensemble that ranks labels flipped on purpose below this is called weak."""
ABOUT: dict[Kind, str] = {
    "incorrect": "of lowest strength, as many as the noise rate says",
    "ambiguous": "members disagree with one another, or are against the label",
    "normal": "all members are for the label",
}
DONE = {
    "soft": 'every pair was given "target"',
    "weight": 'suspects were given a lower "weight"',
    "flip": "suspects were turned round",
    "drop": "suspects were left out",
    "none": "nothing was changed",
}


def kind_counts(verdict: Verdict) -> dict[Kind, int]:
    """Pairs of each kind."""
    kinds = [verdict.kind_of(number) for number in range(len(verdict.mean_N))]
    return {kind: kinds.count(kind) for kind in KINDS}


def caution(verdict: Verdict) -> str:
    """How far the ensemble can be trusted."""
    said = "Low strength says that the ensemble disagrees with a label, not that the label is wrong. "
    if not verdict.planted:
        return f"{said}How many wrong labels it finds was not measured (planted = 0)."
    auc, precision = verdict.planted["auc"], verdict.planted["precision"]
    found = f"Of labels flipped on purpose it finds: AUC {auc:.2f}; {precision:.0%} of as many suspects were such"
    if auc >= WEAK:
        return f"{said}{found}."
    return f"{said}{found}. That is weak: suspects are little better than a guess. Do not flip."


def summary(found: Found, verdict: Verdict, args: LabelNoise, written: int) -> str:
    """What the terminal shows."""
    counts = kind_counts(verdict)
    skipped = "".join(f", {count:,} left out ({reason})" for reason, count in found.skipped.items())
    lines = [
        f"{len(found.pairs):,} pairs{skipped}; {written:,} written, {DONE[args.treat]}",
        f"members that have not seen a label agree with {verdict.agreement:.1%} of them",
        f"noise rate {verdict.noise_rate:.1%}, {'as given' if args.share else 'the most likely'}; "
        f"by confident learning, which counts the ensemble's errors too, {verdict.confident:.1%}",
        *(f"  {kind:10s} {counts[kind]:7,}  {ABOUT[kind]}" for kind in KINDS),
        caution(verdict),
    ]
    return "\n".join(lines)


def render_page(found: Found, verdict: Verdict, args: LabelNoise, written: int) -> str:
    """The page. Texts of the file are escaped."""
    counts = kind_counts(verdict)
    tiles = [
        ("pairs", f"{len(found.pairs):,}"),
        *((f"left out: {reason}", f"{count:,}") for reason, count in found.skipped.items()),
        ("noise rate, as given" if args.share else "most likely noise rate", f"{verdict.noise_rate:.1%}"),
        ("noise rate by confident learning", f"{verdict.confident:.1%}"),
        ("labels that unseeing members agree with", f"{verdict.agreement:.1%}"),
        *((kind, f"{count:,}") for kind, count in counts.items()),
        ("pairs written", f"{written:,}"),
    ]
    if verdict.planted:
        tiles.append(("AUC of labels flipped on purpose", f"{verdict.planted['auc']:.2f}"))
    return page_template("label_noise.html.jinja").render(
        name=args.data, tiles=tiles, caution=caution(verdict), done=DONE[args.treat], about=ABOUT,
        features=args.model or f"tf-idf of words and pairs of words, {args.dimensions} dimensions",
        members=f"{args.rounds} members a pair, {args.folds} folds, {args.head.kind} heads, seed {args.seed}",
        plot=Markup(inline_svg(strength_plot(verdict), "strength")),
        tables=[(kind, counts[kind], table_rows(found, verdict, kind, args.rows)) for kind in KINDS],
    )  # fmt: skip


def table_rows(found: Found, verdict: Verdict, kind: Kind, most: int) -> list[dict[str, Any]]:
    """Pairs of a kind, those of lowest strength first."""
    chosen = [i for i in np.argsort(verdict.mean_N, kind="stable") if verdict.kind_of(i) == kind][:most]
    return [
        {
            "where": found.pairs[i].where, "prompt": prompt_text(found.pairs[i].prompt),
            "chosen": found.pairs[i].chosen, "rejected": found.pairs[i].rejected,
            "strength": f"{verdict.mean_N[i]:+.2f}", "std": f"{verdict.std_N[i]:.2f}",
            "vote": f"{verdict.vote_N[i]:.0%}", "target": f"{verdict.target_N[i]:.2f}",
        }
        for i in chosen
    ]  # fmt: skip


def prompt_text(prompt: Any) -> str:
    """A prompt to read, of messages or of text."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def strength_plot(verdict: Verdict) -> str:
    """Histogram of strength, suspects in another colour, as SVG."""
    low, high = np.quantile(verdict.mean_N, [0.001, 0.999])
    edges = np.linspace(low, high if high > low else low + 1, 61)
    inside = np.clip(verdict.mean_N, edges[0], edges[-1])
    with rc_context(STYLE):
        figure = Figure(figsize=(8, 3), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        groups = [inside[~verdict.suspects_N], inside[verdict.suspects_N]]
        axes.hist(groups, bins=edges.tolist(), stacked=True, color=[TRAIN, HELD_OUT], label=["others", "incorrect"])
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set(xlabel="strength: mean of r(chosen) - r(rejected)", ylabel="pairs")
        axes.legend(frameon=False)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return text.getvalue()
