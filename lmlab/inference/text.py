"""Text in, text out: prompts and stop texts in terms of a tokenizer."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from lmlab.core.errors import check_text
from lmlab.core.types import Key, Params
from lmlab.inference.config import SamplingConfig
from lmlab.inference.sample import Sample, draw, sample
from lmlab.models.lm import LM

CONTEXT = 8
"""Tokens before a continuation that it is decoded with: some tokenizers write a first word without its space."""
STREAM_STRIDE = 8
"""Tokens between two looks at a text that somebody is watching."""


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


def encode_prompts(codec: TextCodec, prompts: Sequence[str]) -> list[np.ndarray]:
    """A prompt begins as the texts do that the model has learnt from; an empty prompt is a new text.

    Raises `UserError` for one that is no text.
    """
    for prompt in prompts:
        check_text("--prompt", prompt)
    return [np.concatenate([codec.begin_ids, tokens]).astype(np.int32) for tokens in codec.encode_batch(list(prompts))]


def continuation(codec: TextCodec, prompt: np.ndarray, tokens: np.ndarray) -> str:
    """The text that tokens add to that of a prompt."""
    before = prompt[-CONTEXT:].tolist()
    start, whole = codec.decode(before), codec.decode(before + tokens.tolist())
    return whole[len(start) :] if whole.startswith(start) else codec.decode(tokens.tolist())


def sample_text(
    lm: LM, params: Params, codec: TextCodec, prompts: Sequence[str], key: Key, config: SamplingConfig, *,
    rows: int = 64,
) -> list[tuple[str, Sample]]:  # fmt: skip
    """Continue each prompt, read as the beginning of a document; the text ends before the first stop text."""
    return sample_texts(lm, params, codec, encode_prompts(codec, prompts), key, config, rows=rows)


def sample_texts(
    lm: LM, params: Params, codec: TextCodec, prompts: Sequence[np.ndarray], key: Key, config: SamplingConfig, *,
    rows: int = 64,
) -> list[tuple[str, Sample]]:  # fmt: skip
    """The same after prompts that are tokens already, such as chats."""
    cut = lambda tokens: _kept(codec, tokens, config.stop)
    drawn = sample(lm, params, prompts, key, config, end_ids=codec.end_ids, stopped=cut, rows=rows)
    texts = (continuation(codec, prompt, one.tokens) for prompt, one in zip(prompts, drawn, strict=True))
    return [(before_stop(text, config.stop), one) for text, one in zip(texts, drawn, strict=True)]


def stream_text(
    lm: LM, params: Params, codec: TextCodec, prompt: np.ndarray, key: Key, config: SamplingConfig
) -> Iterator[str]:
    """The continuation of one prompt piece by piece, as it is drawn. What may be the beginning of a stop text, or of a
    character, waits for what follows.
    """
    cut = lambda tokens: _kept(codec, tokens, config.stop)
    shown = ""
    news = draw(
        lm, params, [prompt], key, config, end_ids=codec.end_ids, stopped=cut, stride=STREAM_STRIDE
    )  # fmt: skip
    for update in news:
        text = before_stop(continuation(codec, prompt, update.sample.tokens), config.stop)
        ready = text if update.finished else _settled(text, config.stop)
        if len(ready) > len(shown):
            yield ready[len(shown) :]
            shown = ready


def _settled(text: str, stops: Sequence[str]) -> str:
    """The part of a text that no further token can change or turn into a stop text."""
    text = text.rstrip("\ufffd")
    held = max((size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size])), default=0)
    return text[: len(text) - held]


def _kept(codec: TextCodec, tokens: np.ndarray, stops: Sequence[str]) -> int | None:
    """The fewest tokens whose text holds a stop text; None where it holds none."""
    text = codec.decode(tokens.tolist())
    if not any(stop in text for stop in stops):
        return None
    low, high = 1, len(tokens)
    while low < high:
        middle = (low + high) // 2
        held = codec.decode(tokens[:middle].tolist())
        low, high = (low, middle) if any(stop in held for stop in stops) else (middle + 1, high)
    return low


def before_stop(text: str, stops: Sequence[str]) -> str:
    """A text up to the first stop text."""
    ends = [text.find(stop) for stop in stops if stop in text]
    return text[: min(ends)] if ends else text
