"""Speculative decoding (arXiv 2211.17192, 2302.01318): a small model drafts, the large one reads the draft at once and
keeps of it what leaves its own distribution exact.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from lmlab.core.errors import check
from lmlab.core.types import Array, Key, Params
from lmlab.inference.config import SamplingConfig, Verify
from lmlab.inference.draw import tokens_at
from lmlab.inference.engine import bucket, read_prompts
from lmlab.inference.filters import filter_logits
from lmlab.inference.sample import Sample, check_prompts
from lmlab.models.lm import LM


class Model(NamedTuple):
    """A language model with its parameters."""

    lm: LM
    params: Params


class Speculated(NamedTuple):
    """What was drawn, and at what cost."""

    samples: list[Sample]
    passes: int
    """Passes of the large model over the batch."""
    accepted: float
    """Share of the drafted tokens that were kept."""


@struct.dataclass
class Drafting:
    """A batch in the middle of being drawn. The caches hold all tokens of a row but the last."""

    cache: Any
    draft: Any
    """What drafts are made with: the cache of the model that makes them, or the drafts themselves."""
    tokens_BS: Array
    logprobs_BS: Array
    length_B: Array
    limit_B: Array
    done_B: Array
    passes: Array
    offered: Array
    kept: Array


def speculate(
    target: Model, draft: Model, prompts: Sequence[np.ndarray], key: Key, config: SamplingConfig, *,
    ahead: int = 4, verify: Verify = "token", end_ids: tuple[int, ...] = (),
) -> Speculated:  # fmt: skip
    """Samples as `sample` draws them from the target, though not the same ones; all prompts at once.

    ahead: K, tokens that are drafted between two passes of the target. verify: see `Verify`. Stop texts are not looked
    at; the shorter of the two contexts limits what is drawn. Raises `UserError` as `sample`, where the two do not have
    the same vocabulary, and for a repetition_penalty.
    """
    check(target.lm.vocab_size == draft.lm.vocab_size, "draft", f"a vocabulary of {draft.lm.vocab_size}",
          f"that of the target, {target.lm.vocab_size}", "Both need the same tokenizer.")  # fmt: skip
    check(ahead >= 1, "ahead", ahead, "at least 1")
    check(config.repetition_penalty == 1, "repetition_penalty", config.repetition_penalty, "1 when speculating")
    check_verify(verify)
    for model in (target, draft):
        check_prompts(model.lm, prompts)
    target, draft = (Model(*model.lm.for_decoding(model.params)) for model in (target, draft))
    longest = min(target.lm.max_length, draft.lm.max_length)
    rows = begin(prompts, config, ahead, longest)

    def read(model: Model) -> Any:
        _, cache = read_prompts(model.lm, model.params, prompts, rows.tokens_BS.shape[1])
        return model.lm.rewind(model.lm.take_rows(cache, jnp.arange(len(prompts))), rows.length_B - 1)

    state = replace(rows, cache=read(target), draft=read(draft))
    keys_B = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(len(prompts)))
    static = replace(config, max_new_tokens=1, stop=())
    state = _run(target.lm, draft.lm, (target.params, draft.params), keys_B, state, static, end_ids, ahead, verify)
    return finish(prompts, state)


def check_verify(verify: Verify) -> None:
    """Raise `UserError` for another word."""
    check(verify in get_args(Verify), "verify", verify, " or ".join(get_args(Verify)))


def begin(prompts: Sequence[np.ndarray], config: SamplingConfig, ahead: int, longest: int) -> Drafting:
    """A batch that holds its prompts, and that no model has read yet. longest: tokens that a row may hold."""
    length_B = np.asarray([len(prompt) for prompt in prompts], np.int32)
    limit_B = np.minimum(length_B + config.max_new_tokens, longest)
    room = min(bucket(int(limit_B.max()) + ahead + 1), longest)
    tokens_BS = np.zeros((len(prompts), room), np.int32)
    for tokens_S, prompt in zip(tokens_BS, prompts, strict=True):
        tokens_S[: len(prompt)] = prompt
    count = lambda: jnp.zeros((), jnp.int32)
    return Drafting(
        None, None, jnp.asarray(tokens_BS), jnp.zeros(tokens_BS.shape), jnp.asarray(length_B), jnp.asarray(limit_B),
        jnp.zeros(len(prompts), bool), count(), count(), count(),
    )  # fmt: skip


def finish(prompts: Sequence[np.ndarray], state: Drafting) -> Speculated:
    """What was drawn."""
    samples = []
    for row, (prompt, last) in enumerate(zip(prompts, np.asarray(state.length_B), strict=True)):
        new = slice(len(prompt), int(last))
        drawn = np.asarray(state.tokens_BS[row, new]), np.asarray(state.logprobs_BS[row, new])
        samples.append(Sample(*drawn, ended=bool(last < state.limit_B[row])))
    return Speculated(samples, int(state.passes), int(state.kept) / max(int(state.offered), 1))


def acceptance(target_V: Array, draft_V: Array) -> Array:
    """Probability with which each drafted token is kept: min(1, p / q), [..., V] (arXiv 2211.17192 eq. 1)."""
    return jnp.minimum(1.0, target_V / jnp.where(draft_V > 0, draft_V, 1))


def residual(target_V: Array, draft_V: Array) -> Array:
    """What a token is drawn from where the draft was not kept: max(0, p - q), normalised, [..., V].

    Where both are equal nothing is ever rejected, and it is the target.
    """
    rest_V = jnp.maximum(target_V - draft_V, 0)
    total = jnp.sum(rest_V, axis=-1, keepdims=True)
    return jnp.where(total > 0, rest_V / jnp.where(total > 0, total, 1), target_V)


def keep(uniform_BJ: Array, drafted_BK: Array, draft_BKV: Array, target_BJV: Array) -> tuple[Array, Array]:
    """How many drafted tokens are kept, [B], and the token that follows them, [B].

    uniform: K numbers in [0, 1) for the drafted tokens, and one for the next. draft, target: probabilities after
    filters; the target's, J = K + 1, also of the token after the whole draft.
    """
    ahead = drafted_BK.shape[1]
    chosen_BK = jnp.take_along_axis(
        acceptance(target_BJV[:, :ahead], draft_BKV), drafted_BK[..., None], axis=2
    )[..., 0]  # fmt: skip
    count_B = jnp.sum(jnp.cumprod((uniform_BJ[:, :ahead] < chosen_BK).astype(jnp.int32), axis=1), axis=1)
    # After a draft that was kept whole there is nothing to subtract.
    none_B1V = jnp.zeros_like(target_BJV[:, :1])
    rest_BJV = residual(target_BJV, jnp.concatenate([draft_BKV, none_B1V], axis=1))
    next_BV = jnp.take_along_axis(rest_BJV, count_B[:, None, None], axis=1)[:, 0]
    # log(0) is -inf, which is never drawn.
    return count_B, tokens_at(uniform_BJ[:, ahead], jnp.log(next_BV))


def block_acceptance(drafted_BK: Array, draft_BKV: Array, target_BJV: Array) -> tuple[Array, Array]:
    """Block verification (arXiv 2403.10444, algorithm 2): as exact as `keep`, and keeps more on average.

    Returns the probability [B, K] that at least i tokens are kept, given that no more than i can be; and [B, J, V] what
    the next token is drawn from after each number of them, not normalised.
    """
    ratio_BK = jnp.take_along_axis(
        target_BJV[:, :-1] / jnp.where(draft_BKV > 0, draft_BKV, 1), drafted_BK[..., None], 2
    )
    weight_BJ = [jnp.ones(len(drafted_BK))]
    for i in range(drafted_BK.shape[1]):
        weight_BJ.append(jnp.minimum(weight_BJ[-1] * ratio_BK[:, i, 0], 1))
    weight_BJ1 = jnp.stack(weight_BJ, axis=1)[..., None]
    none_B1V = jnp.zeros_like(target_BJV[:, :1])
    rest_BJV = jnp.maximum(weight_BJ1 * target_BJV - jnp.concatenate([draft_BKV, none_B1V], axis=1), 0)
    total_BJ1 = jnp.sum(rest_BJV, axis=2, keepdims=True)
    # After the whole draft the rest is the target times the weight, which makes this the weight.
    over_BJ1 = total_BJ1 + 1 - weight_BJ1
    chance_BJ1 = total_BJ1 / jnp.where(over_BJ1 > 0, over_BJ1, 1)
    # Where both are equal nothing is left over: then more is kept than this, always.
    return chance_BJ1[:, 1:, 0], jnp.where(total_BJ1 > 0, rest_BJV, target_BJV)


def keep_block(uniform_BJ: Array, drafted_BK: Array, draft_BKV: Array, target_BJV: Array) -> tuple[Array, Array]:
    """As `keep`, by block verification."""
    ahead = drafted_BK.shape[1]
    chance_BK, rest_BJV = block_acceptance(drafted_BK, draft_BKV, target_BJV)
    count_B = jnp.max(jnp.where(uniform_BJ[:, :ahead] < chance_BK, jnp.arange(1, ahead + 1), 0), axis=1, initial=0)
    next_BV = jnp.take_along_axis(rest_BJV, count_B[:, None, None], axis=1)[:, 0]
    return count_B, tokens_at(uniform_BJ[:, ahead], jnp.log(next_BV))


def round_numbers(keys_B: Key, length_B: Array, ahead: int) -> tuple[Array, Array]:
    """Numbers in [0, 1) of each row, [B, J] to draft with and [B, J] to keep with, J = K + 1, all of them of one draw:
    many small ones take longer than a small model. A row has never been as long before, so that no key serves twice.
    """
    draw = lambda key, length: jax.random.uniform(jax.random.fold_in(key, length), (2, ahead + 1))
    both_B2J = jax.vmap(draw)(keys_B, length_B)
    return both_B2J[:, 0], both_B2J[:, 1]


def verified(
    uniform_BJ: Array, drafted_BK: Array, draft_BKV: Array, logits_BJV: Array, config: SamplingConfig, verify: Verify
) -> tuple[Array, Array, Array]:
    """How many drafted tokens are kept, [B]; those with the token that follows them, and log-probabilities, [B, J].

    What lies beyond the first `count` + 1 means nothing. logits: of the target at the token before the draft and at
    each of the K = J - 1 drafted.
    """
    decide = keep_block if verify == "block" else keep
    count_B, next_B = decide(uniform_BJ, drafted_BK, draft_BKV, probabilities(logits_BJV, config))
    follows_BJ = jnp.arange(logits_BJV.shape[1])[None] == count_B[:, None]
    new_BJ = jnp.where(follows_BJ, next_B[:, None], jnp.pad(drafted_BK, ((0, 0), (0, 1))))
    logprobs_BJ = jnp.take_along_axis(jax.nn.log_softmax(logits_BJV), new_BJ[..., None], axis=2)[..., 0]
    return count_B, new_BJ, logprobs_BJ


@partial(jax.jit, static_argnums=(0, 1, 5, 6, 7, 8))
def _run(
    lm: LM, draft_lm: LM, params: tuple[Params, Params], keys_B: Key, state: Drafting, config: SamplingConfig,
    end_ids: tuple[int, ...], ahead: int, verify: Verify,
) -> Drafting:  # fmt: skip
    """Draft, read and keep until all rows are done."""
    rows = jnp.arange(len(keys_B))

    def one_round(state: Drafting) -> Drafting:
        draft_BJ, keep_BJ = round_numbers(keys_B, state.length_B, ahead)
        last_B = state.tokens_BS[rows, state.length_B - 1]
        draft_cache, drafted_BK, draft_BKV = _draft(draft_lm, params[1], state.draft, last_B, draft_BJ, config, ahead)
        read_BJ = jnp.concatenate([last_B[:, None], drafted_BK], axis=1)
        hidden_BJD, cache = lm.apply(params[0], read_BJ, cache=state.cache)
        logits_BJV = lm.logits(params[0], hidden_BJD)
        count_B, new_BJ, logprobs_BJ = verified(keep_BJ, drafted_BK, draft_BKV, logits_BJV, config, verify)
        state = append(state, new_BJ, logprobs_BJ, count_B, end_ids)
        # The last token is read in the next round, with the draft that follows it.
        back = state.length_B - 1
        return replace(state, cache=lm.rewind(cache, back), draft=draft_lm.rewind(draft_cache, back))

    return jax.lax.while_loop(lambda state: ~jnp.all(state.done_B), one_round, state)


def probabilities(logits: Array, config: SamplingConfig) -> Array:
    """What tokens are drawn from, [..., V]."""
    flat = logits.reshape(-1, logits.shape[-1])
    return jax.nn.softmax(filter_logits(flat, config)).reshape(logits.shape)


def _draft(
    lm: LM, params: Params, cache: Any, last_B: Array, uniform_BJ: Array, config: SamplingConfig, ahead: int
) -> tuple[Any, Array, Array]:  # fmt: skip
    """K tokens drawn after the last one, [B, K], and what from, [B, K, V]. The cache then holds all K of them."""

    def step(carry: tuple[Any, Array], number: Array) -> tuple[tuple[Any, Array], tuple[Array, Array]]:
        cache, token_B = carry
        hidden_B1D, cache = lm.apply(params, token_B[:, None], cache=cache)
        probs_BV = probabilities(lm.logits(params, hidden_B1D[:, 0]), config)
        token_B = tokens_at(uniform_BJ[:, number], jnp.log(probs_BV))
        return (cache, token_B), (token_B, probs_BV)

    # One step more than there are tokens to offer: the token after them is not, but they are read.
    (cache, _), (drafted_KB, draft_KBV) = jax.lax.scan(step, (cache, last_B), jnp.arange(ahead + 1))
    return cache, drafted_KB[:ahead].T, draft_KBV[:ahead].transpose(1, 0, 2)


def append(
    state: Drafting, new_BJ: Array, logprobs_BJ: Array, count_B: Array, end_ids: tuple[int, ...]
) -> Drafting:  # fmt: skip
    """Add the first `count` + 1 new tokens to each row, up to an end token or the limit, and count the pass."""
    batch, ahead = len(count_B), new_BJ.shape[1] - 1
    number_1J = jnp.arange(ahead + 1)[None]
    places_BJ = state.length_B[:, None] + number_1J
    ended_BJ = (number_1J <= count_B[:, None]) & jnp.isin(new_BJ, jnp.asarray(end_ids, jnp.int32))
    # What lies beyond an end or the limit was not on offer; an end that was drafted is kept, though it is not text.
    open_BJ = (jnp.cumsum(ended_BJ, axis=1) - ended_BJ == 0) & (places_BJ < state.limit_B[:, None])
    open_BJ &= ~state.done_B[:, None]
    kept_BJ = open_BJ & ~ended_BJ & (number_1J <= count_B[:, None])
    at = jnp.arange(batch)[:, None], jnp.where(kept_BJ, places_BJ, state.tokens_BS.shape[1])
    length_B = state.length_B + jnp.sum(kept_BJ, axis=1, dtype=jnp.int32)
    return replace(
        state,
        tokens_BS=state.tokens_BS.at[at].set(new_BJ, mode="drop"),
        logprobs_BS=state.logprobs_BS.at[at].set(logprobs_BJ, mode="drop"),
        length_B=length_B,
        done_B=state.done_B | jnp.any(ended_BJ, axis=1) | (length_B >= state.limit_B),
        passes=state.passes + 1,
        offered=state.offered + jnp.sum(open_BJ[:, :ahead], dtype=jnp.int32),
        kept=state.kept + jnp.sum(open_BJ & (number_1J < count_B[:, None]), dtype=jnp.int32),
    )
