"""The compiled parts of sampling over a cache of static shape: read prompts, draw tokens, change rows."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from lmlab.core.types import Array, Key, Params
from lmlab.inference.config import SamplingConfig
from lmlab.inference.draw import draw_tokens
from lmlab.inference.filters import Processor, filter_logits, penalise_repetition
from lmlab.models.lm import LM

CHUNK = 512
"""Tokens of a prompt that are read at once: bounds the memory of attention, and the number of compilations."""


@struct.dataclass
class Decoding:
    """A batch in the middle of being drawn. A row that is done stays as it is until another takes its place."""

    cache: Any
    logits_BV: Array
    """Of the next token."""
    tokens_BS: Array
    """Prompt and drawn tokens of each row; end tokens are not among them."""
    logprobs_BS: Array
    """Of the drawn tokens, at their places, under the model itself: before processors, temperature and filters."""
    length_B: Array
    """[B] int32: how many tokens each row holds."""
    prompt_B: Array
    """[B] int32: how many of them are its prompt."""
    limit_B: Array
    """[B] int32: how many it may hold."""
    keys_B: Key
    """Each row has its own key, so a prompt's sample does not depend on its neighbours."""
    done_B: Array


def bucket(length: int, least: int = 16) -> int:
    """The next power of two: few shapes, so few compilations."""
    return max(least, 1 << (length - 1).bit_length())


@partial(jax.jit, static_argnums=(0, 1, 2))
def idle(lm: LM, rows: int, room: int, key: Key) -> Decoding:
    """A batch of rows that are done, with room for so many tokens each. key: any of the kind that rows will have."""
    count = lambda: jnp.zeros(rows, jnp.int32)
    return Decoding(
        cache=lm.init_cache(rows, room), logits_BV=jnp.zeros((rows, lm.vocab_size)),
        tokens_BS=jnp.zeros((rows, room), jnp.int32), logprobs_BS=jnp.zeros((rows, room)), length_B=count(),
        prompt_B=count(), limit_B=count(), keys_B=jax.random.split(key, rows), done_B=count() == 0,
    )  # fmt: skip


@partial(jax.jit, static_argnums=(0, 2))
def resize(lm: LM, state: Decoding, room: int) -> Decoding:
    """The same batch with more room."""
    more = room - state.tokens_BS.shape[1]
    wide = lambda x_BS: jnp.pad(x_BS, ((0, 0), (0, more)))
    return replace(
        state, cache=lm.resize(state.cache, room), tokens_BS=wide(state.tokens_BS), logprobs_BS=wide(state.logprobs_BS)
    )


def read_prompts(
    lm: LM, params: Params, prompts: Sequence[np.ndarray], room: int, again: int = 0
) -> tuple[Array, Any]:  # fmt: skip
    """Logits [N, V] of the token after each prompt, and the cache; N is the next power of two.

    Prompts are read in pieces. again: tokens that a piece shares with the one before, where a model can only enter a
    token rightly that it reads together with so many after it.
    """
    rows = bucket(len(prompts), least=1)
    longest = max(map(len, prompts))
    tokens_NT, length_N = np.zeros((rows, longest + CHUNK), np.int32), np.zeros(rows, np.int32)
    for row, prompt in enumerate(prompts):
        tokens_NT[row, : len(prompt)], length_N[row] = prompt, len(prompt)
    logits_NV, cache = _empty(lm, rows, room)
    for start in range(0, max(longest - again, 1), CHUNK - again):
        cache = lm.rewind(cache, jnp.full(rows, start, jnp.int32)) if again and start else cache
        width = min(CHUNK, bucket(longest - start), lm.max_length)
        held_N = np.clip(length_N - start, 0, width)
        logits_NV, cache = _read(lm, params, logits_NV, cache, tokens_NT[:, start : start + width], held_N)
    return logits_NV, cache


@partial(jax.jit, static_argnums=(0, 1, 2))
def _empty(lm: LM, rows: int, room: int) -> tuple[Array, Any]:
    return jnp.zeros((rows, lm.vocab_size)), lm.init_cache(rows, room)


@partial(jax.jit, static_argnums=0, donate_argnums=(2, 3))
def _read(
    lm: LM, params: Params, logits_NV: Array, cache: Any, tokens_NT: Array, held_N: Array
) -> tuple[Array, Any]:  # fmt: skip
    """Read the first `held` tokens of each row on top of what its cache holds; a row of none keeps its logits."""
    rows, width = tokens_NT.shape
    segments_NT = (jnp.arange(width)[None] < held_N[:, None]).astype(jnp.int32)
    hidden_NTD, cache = lm.apply(params, tokens_NT, segments_BT=segments_NT, cache=cache)
    last_ND = hidden_NTD[jnp.arange(rows), jnp.maximum(held_N - 1, 0)]
    return jnp.where(held_N[:, None] > 0, lm.logits(params, last_ND), logits_NV), cache


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def enter(
    lm: LM, state: Decoding, read: tuple[Array, Any], source_N: Array, slots_N: Array, prompts_NS: Array,
    prompt_N: Array, limit_N: Array, keys_N: Key,
) -> Decoding:  # fmt: skip
    """Put rows that `read_prompts` has made in place of rows that are done.

    Row `source` of what was read goes to row `slot` of the batch, repeats allowed: n samples of a prompt read it once.
    A slot beyond the last is nobody's. prompts: tokens, padded to the room of the batch.
    """
    logits_UV, cache = read
    put = lambda old, new: old.at[slots_N].set(new, mode="drop")
    return Decoding(
        cache=lm.put_rows(state.cache, slots_N, lm.take_rows(cache, source_N)),
        logits_BV=put(state.logits_BV, logits_UV[source_N]),
        tokens_BS=put(state.tokens_BS, prompts_NS),
        logprobs_BS=put(state.logprobs_BS, 0.0),
        length_B=put(state.length_B, prompt_N),
        prompt_B=put(state.prompt_B, prompt_N),
        limit_B=put(state.limit_B, limit_N),
        keys_B=put(state.keys_B, keys_N),
        done_B=put(state.done_B, False),
    )


@partial(jax.jit, static_argnums=(0, 3, 4, 5, 6), donate_argnums=2)
def decode(
    lm: LM, params: Params, state: Decoding, config: SamplingConfig, end_ids: tuple[int, ...],
    processors: tuple[Processor, ...], steps: int,
) -> Decoding:  # fmt: skip
    """Draw up to `steps` tokens a row; stops early when all rows are done.

    Token i of a row is drawn with fold_in(row key, i), so the number of steps that a call makes changes nothing.
    """
    rows = jnp.arange(len(state.done_B))
    room = state.tokens_BS.shape[1]

    def draw(carry: tuple[Decoding, Array]) -> tuple[Decoding, Array]:
        state, i = carry
        logits_BV = state.logits_BV
        if config.repetition_penalty != 1:
            logits_BV = penalise_repetition(logits_BV, state.tokens_BS, state.length_B, config.repetition_penalty)
        for process in processors:
            logits_BV = process(logits_BV, state.tokens_BS, state.length_B)
        keys_B = jax.vmap(jax.random.fold_in)(state.keys_B, state.length_B - state.prompt_B)
        token_B = draw_tokens(keys_B, filter_logits(logits_BV, config))
        logprob_B = jax.nn.log_softmax(state.logits_BV)[rows, token_B]
        done_B = state.done_B | jnp.isin(token_B, jnp.asarray(end_ids, jnp.int32))
        at = rows, jnp.where(done_B, room, state.length_B)
        length_B = state.length_B + ~done_B
        done_B |= length_B >= state.limit_B
        segments_B1 = (~done_B).astype(jnp.int32)[:, None]
        hidden_B1D, cache = lm.apply(params, token_B[:, None], segments_BT=segments_B1, cache=state.cache)
        state = replace(
            state, cache=cache, logits_BV=lm.logits(params, hidden_B1D[:, 0]), length_B=length_B, done_B=done_B,
            tokens_BS=state.tokens_BS.at[at].set(token_B, mode="drop"),
            logprobs_BS=state.logprobs_BS.at[at].set(logprob_B, mode="drop"),
        )  # fmt: skip
        return state, i + 1

    going = lambda carry: (carry[1] < steps) & ~jnp.all(carry[0].done_B)
    return jax.lax.while_loop(going, draw, (state, jnp.zeros((), jnp.int32)))[0]
