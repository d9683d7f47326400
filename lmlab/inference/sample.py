"""Sampling from any LM: one prefill, then one compiled loop over a cache of static shape."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from lmlab.core.errors import check
from lmlab.core.types import Array, Key, Params
from lmlab.inference.config import SamplingConfig
from lmlab.inference.filters import filter_logits
from lmlab.models.lm import LM

STRIDE = 32
"""Tokens drawn between two looks at the stop texts; caches are sized in multiples of it."""


class Sample(NamedTuple):
    """What was drawn for one prompt."""

    tokens: np.ndarray
    """int32 [n], without the end token."""
    logprobs: np.ndarray
    """float32 [n], under the model itself: before temperature and filters."""
    ended: bool
    """True if the end token or a stop came; False if the room ran out."""


@struct.dataclass
class Decoding:
    """A batch in the middle of being drawn."""

    cache: Any
    logits_BV: Array
    """Of the next token."""
    keys_B: Array
    """Each row has its own key, so a prompt's sample does not depend on its neighbours."""
    done_B: Array
    limit_B: Array
    """[B] int32: tokens that each row may draw in all."""
    drawn: Array
    """[] int32: tokens drawn so far."""


def bucket(length: int, least: int = 16) -> int:
    """The next power of two: few shapes, so few compilations."""
    return max(least, 1 << (length - 1).bit_length())


@partial(jax.jit, static_argnums=(0, 4))
def prefill(lm: LM, params: Params, tokens_BT: Array, length_B: Array, room: int) -> tuple[Array, Any]:
    """Read right-padded prompts into a cache of `room` places; logits_BV of the token after each."""
    batch, length = tokens_BT.shape
    segments_BT = (jnp.arange(length)[None] < length_B[:, None]).astype(jnp.int32)
    hidden_BTD, cache = lm.apply(params, tokens_BT, segments_BT=segments_BT, cache=lm.init_cache(batch, room))
    last_BD = hidden_BTD[jnp.arange(batch), length_B - 1]
    return lm.logits(params, last_BD), cache


@partial(jax.jit, static_argnums=(0, 3, 4, 5), donate_argnums=2)
def decode(
    lm: LM, params: Params, state: Decoding, config: SamplingConfig, end_ids: tuple[int, ...], steps: int
) -> tuple[Decoding, Array, Array]:
    """Draw up to `steps` tokens a row; stops early when all rows are done.

    Returns the state, tokens_BS (rows that are done hold -1) and their logprobs_BS. Token i of a row is drawn
    with fold_in(row key, i), so the number of steps a call makes changes nothing.
    """
    batch = state.done_B.shape[0]

    def draw(carry: tuple[Decoding, Array, Array, Array]) -> tuple[Decoding, Array, Array, Array]:
        state, tokens_BS, logprobs_BS, i = carry
        keys_B = jax.vmap(jax.random.fold_in, in_axes=(0, None))(state.keys_B, state.drawn)
        token_B = jax.vmap(jax.random.categorical)(keys_B, filter_logits(state.logits_BV, config))
        logprob_B = jax.nn.log_softmax(state.logits_BV)[jnp.arange(batch), token_B]
        done_B = state.done_B | jnp.isin(token_B, jnp.asarray(end_ids, jnp.int32))
        tokens_BS = tokens_BS.at[:, i].set(jnp.where(done_B, -1, token_B))
        logprobs_BS = logprobs_BS.at[:, i].set(jnp.where(done_B, 0, logprob_B))
        done_B |= state.drawn + 1 >= state.limit_B
        segments_B1 = (~done_B).astype(jnp.int32)[:, None]
        hidden_B1D, cache = lm.apply(params, token_B[:, None], segments_BT=segments_B1, cache=state.cache)
        state = replace(
            state, cache=cache, logits_BV=lm.logits(params, hidden_B1D[:, 0]), done_B=done_B, drawn=state.drawn + 1
        )
        return state, tokens_BS, logprobs_BS, i + 1

    start = (state, jnp.full((batch, steps), -1), jnp.zeros((batch, steps)), jnp.zeros((), jnp.int32))
    going = lambda carry: (carry[3] < steps) & ~jnp.all(carry[0].done_B)
    state, tokens_BS, logprobs_BS, _ = jax.lax.while_loop(going, draw, start)
    return state, tokens_BS, logprobs_BS


def sample(
    lm: LM, params: Params, prompts: Sequence[np.ndarray], key: Key, config: SamplingConfig, *,
    end_ids: tuple[int, ...] = (), stopped: Callable[[np.ndarray], int | None] = lambda tokens: None,
) -> list[Sample]:  # fmt: skip
    """Continue each prompt (int32 [n], n >= 1) by up to `config.max_new_tokens` tokens.

    end_ids: tokens each of which ends a sample. stopped: given the tokens drawn for a row so far, how many of them to
    keep if the row is to stop (a stop text came), else None; asked every `STRIDE` tokens.
    Row i is drawn with fold_in(key, i). A row that fills the context ends there. Raises `UserError` for no prompt,
    an empty one, one that fills the context by itself, or tokens outside the vocabulary.
    """
    lengths = [len(prompt) for prompt in prompts]
    some = bool(lengths) and min(lengths) >= 1
    check(some, "prompts", lengths, "at least one prompt, of at least one token each")
    longest = max(lengths)
    check(longest < lm.max_length, "prompt", f"{longest} tokens",
          f"less than model.max_length = {lm.max_length}", "Shorten the prompt.")  # fmt: skip
    limits = [min(config.max_new_tokens, lm.max_length - length) for length in lengths]
    width = min(bucket(longest), lm.max_length)
    tokens_BT = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(tokens_BT, prompts, strict=True):
        outside = prompt[(prompt < 0) | (prompt >= lm.vocab_size)]
        check(not len(outside), "prompt", outside[:1].tolist(), f"token ids from 0 to {lm.vocab_size - 1}")
        row[: len(prompt)] = prompt
    room = min(width + -(-max(limits) // STRIDE) * STRIDE, max(lm.max_length, width))
    logits_BV, cache = prefill(lm, params, tokens_BT, np.asarray(lengths, np.int32), room)
    keys_B = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(len(prompts)))
    done_B = jnp.zeros(len(prompts), bool)
    limit_B = jnp.asarray(limits, jnp.int32)
    state = Decoding(cache, logits_BV, keys_B, done_B, limit_B, jnp.zeros((), jnp.int32))
    return _draw_all(lm, params, state, config, end_ids, stopped, limits)


def _draw_all(
    lm: LM, params: Params, state: Decoding, config: SamplingConfig, end_ids: tuple[int, ...],
    stopped: Callable[[np.ndarray], int | None], limits: Sequence[int],
) -> list[Sample]:  # fmt: skip
    """Strides of `decode` until every row has ended or has drawn what it may."""
    batch = len(limits)
    tokens, logprobs = np.zeros((batch, 0), np.int32), np.zeros((batch, 0), np.float32)
    kept: list[int | None] = [None] * batch
    # Neither the number of tokens nor the stop texts are part of what is compiled.
    static = replace(config, max_new_tokens=1, stop=())
    while not bool(jnp.all(state.done_B)):
        state, new, new_logprobs = decode(lm, params, state, static, end_ids, STRIDE)
        tokens = np.concatenate([tokens, np.asarray(new)], axis=1)
        logprobs = np.concatenate([logprobs, np.asarray(new_logprobs)], axis=1)
        for row in range(batch):
            if kept[row] is None:
                kept[row] = stopped(tokens[row][tokens[row] >= 0])
        stop_B = jnp.asarray([cut is not None for cut in kept])
        state = replace(state, done_B=state.done_B | stop_B)
    samples = []
    for row in range(batch):
        drawn = int(np.sum(tokens[row] >= 0))
        size = drawn if kept[row] is None else min(drawn, kept[row] or 0)
        ended = kept[row] is not None or size < limits[row]
        samples.append(Sample(tokens[row, :size].astype(np.int32), logprobs[row, :size], ended))
    return samples
