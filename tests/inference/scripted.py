"""Models that look at the last token alone; of one, the text is known beforehand: after token i comes i + 1."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmlab.models.lm import LM

END = 59


def memoryless_lm(
    vocab: int, hidden: Callable[[Any], Any], logits: Callable[[Any, Any], Any], max_length: int
) -> LM:  # fmt: skip
    """After a token comes what `logits(params, hidden(token))` says, whatever was before it."""

    def apply(params, inputs, *, positions_BT=None, segments_BT=None, mask=None, cache=None):
        del params, positions_BT, segments_BT, mask
        return hidden(inputs), cache

    lm = LM(
        config=None, vocab_size=vocab, max_length=max_length, init=lambda key: {}, apply=apply,
        embed=lambda params, tokens_BT: tokens_BT, head=lambda params: params, logits=logits,
        init_cache=lambda batch, length: jnp.zeros((batch, length)),
        take_rows=lambda cache, rows_N: cache[rows_N],
        put_rows=lambda cache, rows_N, other: cache.at[rows_N].set(other), rewind=lambda cache, length_B: cache,
        resize=lambda cache, length: jnp.zeros((len(cache), length)), axes={},
        for_decoding=lambda params: (lm, params),
    )  # fmt: skip
    return lm


def counting_lm(vocab: int = END + 1, max_length: int = 120) -> LM:
    """After token i comes (i + 1) mod vocab, with a probability of nearly one."""
    following = lambda tokens_BT: jax.nn.one_hot((tokens_BT + 1) % vocab, vocab)
    return memoryless_lm(vocab, following, lambda params, hidden: 100.0 * hidden, max_length)


class Letters:
    """Token i is the character of code 48 + i; the last token ends a document."""

    begin_ids, end_ids = (END,), (END,)

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """One token a character."""
        return [np.asarray([ord(letter) - 48 for letter in text], np.int32) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """One character a token."""
        return "".join(chr(48 + i) for i in ids)


WHOLE = Letters().decode(range(END))
"""The only document of the counting model."""
