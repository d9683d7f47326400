"""What the terminal is told in the end."""

import math

from lmlab.inference.posterior import WeighedText
from lmlab.steering.config import Steer
from lmlab.steering.rounds import Outcome

SHOWN = 20
"""Texts in the terminal."""


def visible(text: str) -> str:
    """Text in one line: what does not print (line ends, controls of a terminal) as Python writes it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def number(value: float, form: str = ".3f") -> str:
    """A number; "none" of the logarithm of nothing."""
    return format(value, form) if math.isfinite(value) else "none"


def plain(log_value: float) -> float:
    """What this is the logarithm of; infinity where no number is that large."""
    return math.exp(log_value) if log_value < 700 else math.inf


def meaning(outcome: Outcome, args: Steer) -> str:
    """What Z estimates."""
    span = f"{len(outcome.rounds)} rounds" if outcome.stopped_by else f"{args.tokens} tokens"
    texts = f"texts that end within {span}" if args.unfinished == "drop" else f"the first {span}"
    return f"the mean weight that the program gives {texts} of the model: of a constraint, how often it is met"


def speed(outcome: Outcome) -> str:
    """Tokens per second over all particles, after the first round, which compiles; empty where nothing was written."""
    return f"{outcome.written / outcome.seconds:,.0f}" if outcome.seconds > 0 and outcome.written else ""


def anew_label(args: Steer) -> str:
    """What is counted of the choices among particles."""
    return "rounds with children not kept" if args.method == "steer" else "rounds with particles drawn anew"


def failure(outcome: Outcome, args: Steer) -> str:
    """Why no text is left; empty where there is one."""
    if outcome.posterior:
        return ""
    last = outcome.rounds[-1]
    if last.share_P.any():
        within = f"before {outcome.stopped_by}" if outcome.stopped_by else f"within {args.tokens} tokens"
        what = "" if outcome.stopped_by else "raise --tokens, or "
        return f"No particle has come to its end {within}, so --unfinished drop leaves none: {what}keep them."
    place = int(last.length_P.max()) + 1
    return (
        f"All {args.particles} particles are dead after round {len(outcome.rounds)}, at token {place} of the text: "
        "nothing that was tried meets the program. Raise --particles, or see whether it can be met after this prompt."
    )


def summary(outcome: Outcome, args: Steer, drawn: WeighedText | None) -> str:
    """The result, texts by their probability. drawn: one of them by it."""
    made, resampled = len(outcome.rounds), sum(outcome.anew)
    stopped = f"stopped by {outcome.stopped_by} after round {made}: texts as they were then"
    lines = [stopped] if outcome.stopped_by else []
    evidence = number(outcome.log_evidence)
    lines += [f"log Z           {evidence}" + (f"   (Z = {plain(outcome.log_evidence):.3g})" if drawn else "")]
    lines += [f"                Z estimates {meaning(outcome, args)}"]
    lines += [
        f"effective size  {outcome.effective:.1f} of {args.particles} particles",
        f"{anew_label(args)}: {resampled} of {made}",
    ]
    if fast := speed(outcome):
        lines += [f"speed           {fast} tokens per second over all particles"]
    if drawn is None:
        return "\n".join([*lines, "", failure(outcome, args)])
    count = len(outcome.posterior)
    lines += ["", f"{count} text{'s' if count > 1 else ''} by probability (... where the program has not ended one)"]
    lines += [f"  {one.probability:.3f}  {shown_text(one)}" for one in outcome.posterior[:SHOWN]]
    if count > SHOWN:
        rest = sum(one.probability for one in outcome.posterior[SHOWN:])
        lines += [f"  {rest:.3f}  {count - SHOWN} more, in trace.json"]
    return "\n".join([*lines, "", f"drawn by these probabilities: {shown_text(drawn)}"])


def shown_text(one: WeighedText) -> str:
    """A text in one line, and whether it goes on."""
    return visible(one.text) + ("" if one.finished else " ...")
