"""trace.json: all that happened, for other programs to read. Strict JSON: null stands for what is not finite."""

import json
import math
from dataclasses import asdict
from typing import Any

import numpy as np

from lmlab.core.serialize import to_json
from lmlab.inference.posterior import WeighedText
from lmlab.inference.text import TextCodec
from lmlab.steering.config import Steer
from lmlab.steering.rounds import Outcome, Round
from lmlab.steering.told import failure, meaning

DIGITS = 7
"""Of weights, which are float32."""


def write_trace(outcome: Outcome, codec: TextCodec, args: Steer, drawn: WeighedText | None) -> str:
    """The content of trace.json."""
    data = {
        "settings": to_json(args), "prompts": outcome.prompts, "stopped_by": outcome.stopped_by or None,
        "failure": failure(outcome, args) or None, "log_evidence": outcome.log_evidence,
        "evidence_is": meaning(outcome, args),
        "effective_size": outcome.effective, "posterior": [asdict(one) for one in outcome.posterior],
        "drawn": None if drawn is None else drawn.text, "particles": _particles(outcome),
        "rounds": [_round(outcome, number) for number in range(len(outcome.rounds))], "pieces": _pieces(outcome, codec),
    }  # fmt: skip
    return json.dumps(plain(data), allow_nan=False)


def plain(value: Any) -> Any:
    """Arrays as lists, floats of `DIGITS` digits, and None for those that are not finite."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value


def _particles(outcome: Outcome) -> list[dict[str, Any]]:
    columns = outcome.texts, outcome.finished_P.tolist(), outcome.log_weight_P.tolist(), outcome.share_P.tolist()
    names = "text", "finished", "log_weight", "share"
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def _round(outcome: Outcome, number: int) -> dict[str, Any]:
    """A round: its particles, and the children that they were chosen from."""
    one: Round = outcome.rounds[number]
    return {
        "parent": one.parent_P, "child": one.child_P, "tokens": one.tokens, "log_weight": one.log_weight_P,
        "finished": one.finished_P, "log_evidence": one.log_evidence, "effective_size": one.effective,
        "effective_children": float(outcome.child_effective_T[number]), "drawn_anew": outcome.anew[number],
        "children_log_weight": outcome.child_weight_TPK[number],
        "children_token": None if outcome.moves_TPK is None else outcome.moves_TPK[number],
    }  # fmt: skip


def _pieces(outcome: Outcome, codec: TextCodec) -> dict[str, str]:
    """The text of each token that occurs."""
    found = {token for one in outcome.rounds for tokens in one.tokens for token in tokens}
    found |= set() if outcome.moves_TPK is None else set(np.unique(outcome.moves_TPK).tolist())
    return {str(token): codec.decode([token]) for token in sorted(found)}
