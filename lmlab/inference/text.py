"""Text in, text out: prompts and stop texts in terms of a tokenizer."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from lmlab.core.types import Key, Params
from lmlab.inference.config import SamplingConfig
from lmlab.inference.sample import Sample, sample
from lmlab.models.lm import LM


class TextCodec(Protocol):
    """What sampling needs of a tokenizer."""

    @property
    def begin_ids(self) -> tuple[int, ...]:
        """What comes before a text."""

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens each of which ends a text."""

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Tokens of each text."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of tokens."""


def sample_text(
    lm: LM, params: Params, codec: TextCodec, prompts: Sequence[str], key: Key, config: SamplingConfig
) -> list[tuple[str, Sample]]:
    """Continue each prompt, read as the beginning of a document; the text ends before the first stop text."""
    encoded = codec.encode_batch(list(prompts))
    # A prompt begins as the texts do that the model has learnt from; an empty prompt is a new text.
    starts = [np.concatenate([codec.begin_ids, tokens]).astype(np.int32) for tokens in encoded]

    def cut(tokens: np.ndarray) -> int | None:
        text = codec.decode(tokens.tolist())
        if not any(stop in text for stop in config.stop):
            return None
        # The fewest tokens whose text holds a stop text.
        low, high = 1, len(tokens)
        while low < high:
            middle = (low + high) // 2
            held = codec.decode(tokens[:middle].tolist())
            low, high = (low, middle) if any(stop in held for stop in config.stop) else (middle + 1, high)
        return low

    drawn = sample(lm, params, starts, key, config, end_ids=codec.end_ids, stopped=cut)
    return [(_before_stop(codec.decode(one.tokens.tolist()), config.stop), one) for one in drawn]


def _before_stop(text: str, stops: Sequence[str]) -> str:
    ends = [text.find(stop) for stop in stops if stop in text]
    return text[: min(ends)] if ends else text
