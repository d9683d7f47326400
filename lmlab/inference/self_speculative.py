"""Self-speculative decoding (arXiv 2404.19737, after 1811.03115): the further heads of a model draft, its first head
reads the draft at once and keeps of it what leaves its own distribution exact.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmlab.core.errors import check
from lmlab.core.types import Array, Key, Params
from lmlab.inference.config import SamplingConfig, Verify
from lmlab.inference.draw import tokens_at
from lmlab.inference.engine import read_prompts
from lmlab.inference.sample import check_prompts
from lmlab.inference.speculative import (
    Drafting,
    Speculated,
    append,
    begin,
    check_verify,
    finish,
    probabilities,
    round_numbers,
    verified,
)
from lmlab.models.lm import MultiTokenLM


def self_speculate(
    model: MultiTokenLM, params: Params, prompts: Sequence[np.ndarray], key: Key, config: SamplingConfig, *,
    ahead: int | None = None, verify: Verify = "token", end_ids: tuple[int, ...] = (),
) -> Speculated:  # fmt: skip
    """Samples as `sample` draws them from head 1, though not the same ones unless greedy; all prompts at once.

    ahead: tokens that are drafted between two passes, by as many of the further heads; all of them if None. Every pass
    reads ahead + 1 tokens a row and keeps 1 to ahead + 1. verify: see `Verify`; the draft is one block, not a tree.
    Stop texts and repetition_penalty are not looked at. Raises `UserError` as `sample`.
    """
    ahead = model.heads - 1 if ahead is None else ahead
    check(0 <= ahead < model.heads, "ahead", ahead, f"0 to {model.heads - 1}: the model has {model.heads} heads")
    check(config.repetition_penalty == 1, "repetition_penalty", config.repetition_penalty, "1 when speculating")
    check_verify(verify)
    check_prompts(model.lm, prompts)
    model, params = model.for_decoding(params)
    state = begin(prompts, config, ahead, model.lm.max_length)
    _, cache = read_prompts(model.whole, params, prompts, state.tokens_BS.shape[1], again=model.heads - 1)
    cache = model.whole.take_rows(cache, jnp.arange(len(prompts)))
    keys_B = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(len(prompts)))
    static = replace(config, max_new_tokens=1, stop=())
    state = _run(model, params, keys_B, replace(state, cache=cache), static, end_ids, ahead, verify)
    return finish(prompts, state)


@partial(jax.jit, static_argnums=(0, 4, 5, 6, 7))
def _run(
    model: MultiTokenLM, params: Params, keys_B: Key, state: Drafting, config: SamplingConfig,
    end_ids: tuple[int, ...], ahead: int, verify: Verify,
) -> Drafting:  # fmt: skip
    """Read, keep and draft until all rows are done."""
    rows = jnp.arange(len(keys_B))

    def one_round(state: Drafting) -> Drafting:
        drafted_BK, draft_BKV = state.draft
        draft_BJ, keep_BJ = round_numbers(keys_B, state.length_B, ahead)
        last_B = state.tokens_BS[rows, state.length_B - 1]
        read_BJ = jnp.concatenate([last_B[:, None], drafted_BK], axis=1)
        reading = model.read(params, read_BJ, cache=state.cache)
        hidden_BJD, reading = model.head(params, 1, reading, read_BJ)
        logits_BJV = model.lm.logits(params, hidden_BJD)
        count_B, new_BJ, logprobs_BJ = verified(keep_BJ, drafted_BK, draft_BKV, logits_BJV, config, verify)
        draft, cache = _draft(model, params, reading, new_BJ, count_B, draft_BJ, config, ahead)
        state = append(state, new_BJ, logprobs_BJ, count_B, end_ids)
        # The last token is read in the next round, with the draft that follows it.
        return replace(state, cache=model.whole.rewind(cache, state.length_B - 1), draft=draft)

    state = _first_draft(model, params, keys_B, state, config, ahead)
    return jax.lax.while_loop(lambda state: ~jnp.all(state.done_B), one_round, state)


def _draft(
    model: MultiTokenLM, params: Params, reading: Any, new_BJ: Array, place_B: Array, uniform_BJ: Array,
    config: SamplingConfig, ahead: int,
) -> tuple[tuple[Array, Array], Any]:  # fmt: skip
    """K tokens drawn from heads 2 to K + 1, [B, K], what from, [B, K, V], and the cache that these heads have filled.

    new: the tokens that follow those of the reading, of which the first `place` + 1 are the row's. They follow the one
    at `place`, and the draft follows them.
    """
    rows, length = jnp.arange(len(place_B)), new_BJ.shape[1]
    following = jnp.pad(new_BJ, ((0, 0), (0, ahead)))
    tokens, drawn_from = [], []
    for number in range(2, ahead + 2):
        ahead_BJ = following[:, number - 2 : number - 2 + length]
        hidden_BJD, reading = model.head(params, number, reading, ahead_BJ)
        probs_BV = probabilities(model.lm.logits(params, hidden_BJD[rows, place_B]), config)
        token_B = tokens_at(uniform_BJ[:, number - 2], jnp.log(probs_BV))
        following = following.at[rows, place_B + number - 1].set(token_B)
        tokens.append(token_B)
        drawn_from.append(probs_BV)
    if not tokens:
        batch = len(place_B)
        return (jnp.zeros((batch, 0), jnp.int32), jnp.zeros((batch, 0, model.lm.vocab_size))), reading.cache
    return (jnp.stack(tokens, axis=1), jnp.stack(drawn_from, axis=1)), reading.cache


def _first_draft(
    model: MultiTokenLM, params: Params, keys_B: Key, state: Drafting, config: SamplingConfig, ahead: int
) -> Drafting:  # fmt: skip
    """The draft after the prompts, by the heads at the last token but one. Where there is none, those at the only token
    draft one place too far: a poor draft, but a draft.
    """
    rows, back = jnp.arange(len(keys_B)), state.length_B - 1
    before_B = jnp.maximum(back - 1, 0)
    read_B1 = state.tokens_BS[rows, before_B][:, None]
    reading = model.read(params, read_B1, cache=model.whole.rewind(state.cache, before_B))
    _, reading = model.head(params, 1, reading, read_B1)
    last_B1 = state.tokens_BS[rows, back][:, None]
    draft_BJ, _ = round_numbers(keys_B, jnp.zeros_like(before_B), ahead)
    draft, cache = _draft(
        model, params, reading, last_B1, jnp.zeros_like(before_B), draft_BJ, config, ahead
    )  # fmt: skip
    return replace(state, cache=model.whole.rewind(cache, back), draft=draft)
