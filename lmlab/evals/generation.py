"""Evaluation by what a model writes: generate, check each text, count."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from lmlab.core.errors import check as require
from lmlab.core.types import Key, Params
from lmlab.evals.answers import normalise
from lmlab.evals.intervals import standard_error
from lmlab.inference.config import SamplingConfig
from lmlab.inference.text import TextCodec, sample_text
from lmlab.models.lm import LM

Record: TypeAlias = Mapping[str, Any]
Check: TypeAlias = Callable[[str, Record], bool]
"""`check(text, record)`: whether what was written is right for the record."""


class Generated(NamedTuple):
    """What was written for P records, N samples each."""

    values: dict[str, float]
    """accuracy (over all samples) and accuracy_stderr (over records: samples of one record are not independent)."""
    texts: list[list[str]]
    right_PN: np.ndarray
    """bool, what `repeated.pass_at_k` takes."""


def generate_and_check(
    lm: LM, params: Params, codec: TextCodec, records: Sequence[Record], prompt: Callable[[Record], str], check: Check,
    key: Key, config: SamplingConfig, *, samples: int = 1,
) -> Generated:  # fmt: skip
    """Write `samples` continuations of the prompt of each record, and check them.

    Raises `UserError` for no record, and where `sample` does.
    """
    require(len(records) > 0, "records", [], "at least one record")
    require(samples >= 1, "samples", samples, "at least 1")
    prompts = [prompt(record) for record in records for _ in range(samples)]
    drawn = [text for text, _ in sample_text(lm, params, codec, prompts, key, config)]
    texts = [drawn[start : start + samples] for start in range(0, len(drawn), samples)]
    right_PN = np.asarray([[check(text, record) for text in row] for row, record in zip(texts, records, strict=True)])
    rates_P = right_PN.mean(axis=1)
    values = {"accuracy": float(rates_P.mean()), "accuracy_stderr": standard_error(rates_P)}
    return Generated(values, texts, right_PN)


def exact_match(field: str, normalise: Callable[[str], str] = normalise) -> Check:
    """A check that the text equals a field of the record, both after `normalise`."""
    return lambda text, record: normalise(text) == normalise(str(record[field]))
