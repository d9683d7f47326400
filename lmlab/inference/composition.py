"""Programs that put texts together: fill gaps, agree with several prompts, lean to a class."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmlab.core.errors import check
from lmlab.core.types import Array
from lmlab.inference.distributions import Categorical, Geometric
from lmlab.inference.programs import Particle, Program


def infilling(
    fragments: Sequence[Sequence[int]], vocab: int, tokens: int, end_ids: Sequence[int] = (), *, least: int = 2,
    more: float = 0.5,
) -> Program:  # fmt: skip
    """Fragments of text with gaps between them, which the model fills (arXiv 2306.03081, section 4).

    A gap has `least` tokens and, each time with probability `more`, another one; particles are compared where a
    fragment is complete. fragments: tokens, cut in their context; the first and the last may be empty. tokens: how many
    a text may have; particles whose gaps are too long for that die at once, before they starve others that have paid
    for their fragments; give `infer` the same number. end_ids: the first ends the text after the last fragment, and
    weighs it; none of them is drawn in a gap. Raises `UserError` for fragments that say too little, or do not fit.
    """
    parts = [[int(token) for token in fragment] for fragment in fragments]
    check(len(parts) >= 2, "fragments", len(parts), "at least two, with a gap between them")
    check(all(parts[1:-1]), "fragments", parts, "tokens in all but the first and the last")
    check(bool(parts[-1]) or bool(end_ids), "fragments", parts, "a last one with tokens, or an end token")
    check(least >= 1, "least", least, "at least 1")
    check(0 <= more < 1, "more", more, "a probability below 1")
    parts[-1] += [int(token) for token in end_ids[:1]]
    longest, sizes = max(map(len, parts)), [len(part) for part in parts]
    shortest = sum(sizes) + least * (len(parts) - 1)
    check(tokens >= shortest, "tokens", tokens, f"at least {shortest}, for fragments, gaps and the end")
    tables = {
        "tokens": jnp.asarray([part + [0] * (longest - len(part)) for part in parts], jnp.int32),
        "lengths": jnp.asarray(sizes),
        "after": jnp.asarray([sum(sizes[i + 1 :]) + least * (len(parts) - 1 - i) for i in range(len(parts))]),
        "inside": jnp.ones(vocab, bool).at[np.asarray(end_ids, np.int32)].set(False),
    }

    def step(p: Particle, state: tuple[Array, ...]) -> tuple[Array, ...]:
        fragment, place, gap, begins = state
        size = p.sample(Geometric(1 - more)) + least - 1
        gap = jnp.where(begins, size, gap)
        p.condition(p.length + gap + p.tables["lengths"][fragment] - place + p.tables["after"][fragment] <= tokens)
        filling = gap > 0
        p.observe(p.context.mask(p.tables["inside"] | ~filling), True)
        # A draw that can have one outcome only is an observation.
        given = jnp.where(jnp.arange(vocab) == p.tables["tokens"][fragment, place], 0.0, -jnp.inf)
        choice = Categorical(jnp.where(filling, p.context.logprobs_V, given))
        p.sample(p.context.next_token(), choice)
        place = place + ~filling
        complete = ~filling & (place == p.tables["lengths"][fragment])
        p.finish(complete & (fragment == len(parts) - 1))
        return fragment + complete, jnp.where(complete, 0, place), gap - filling, complete

    first = int(not parts[0])
    start = jnp.int32(first), jnp.int32(0), jnp.int32(0), jnp.asarray(bool(first))
    return Program(step, start, tables, boundary=lambda state: state[3])


def intersection(contexts: int, end_ids: Sequence[int] = ()) -> Program:
    """A text that every one of several prompts expects: the product of what they say, normalised over whole texts.

    The locally optimal proposal: a token is drawn by the product of the next-token distributions, and weighs the sum of
    that product over the vocabulary. end_ids: each of them ends the text. Raises `UserError` below two contexts.
    """
    check(contexts >= 2, "contexts", contexts, "at least 2 prompts")

    def step(p: Particle, state: Any) -> Any:
        product = Categorical(jnp.sum(jnp.stack([context.logprobs_V for context in p.contexts]), axis=0))
        token = p.sample(p.context.next_token(), product)
        for context in p.contexts[1:]:
            p.observe(context.next_token(), token)
        p.finish(jnp.isin(token, jnp.asarray(end_ids, jnp.int32)))
        return state

    return Program(step, contexts=contexts)


def classified(scores_V: np.ndarray, bias: float = 0.0, strength: float = 1.0, end_ids: Sequence[int] = ()) -> Program:
    """Texts weighed by the probability of a class, to a power: sigmoid(bias + sum of the scores of their tokens).

    The classifier judges every beginning of a text as if it ended there, and tokens are drawn by what it would say of
    them; only its judgement of the whole text is part of the target. scores: float [V], see `token_scores`; those of
    end_ids count, too. Raises `UserError` for scores that are no numbers.
    """
    check(bool(np.isfinite(scores_V).all()), "scores", "not finite", "a number for each token")

    def judge(total: Array) -> Array:
        return strength * jax.nn.log_sigmoid(total)

    def step(p: Particle, total: Array) -> Array:
        # Before the first token nothing has been judged.
        before = jnp.where(p.length > 0, judge(total), 0.0)
        proposal = Categorical(p.context.logprobs_V + judge(total + p.tables))
        token = p.sample(p.context.next_token(), proposal)
        total = total + p.tables[token]
        p.score(judge(total) - before)
        p.finish(jnp.isin(token, jnp.asarray(end_ids, jnp.int32)))
        return total

    return Program(step, jnp.float32(bias), jnp.asarray(scores_V, jnp.float32))


def token_scores(
    inside: Sequence[np.ndarray], outside: Sequence[np.ndarray], vocab: int, smoothing: float = 1.0
) -> np.ndarray:  # fmt: skip
    """Scores [V] of naive Bayes: log of how much more frequent a token is in texts of the class than in others.

    inside, outside: int32 [n] tokens of texts. smoothing: is added to every count; above 0. Raises `UserError` for no
    texts.
    """
    check(len(inside) > 0, "inside", 0, "at least one text")
    check(len(outside) > 0, "outside", 0, "at least one text")
    check(smoothing > 0, "smoothing", smoothing, "above 0")

    def log_shares(texts: Sequence[np.ndarray]) -> np.ndarray:
        counts_V = np.bincount(np.concatenate(texts).astype(np.int64), minlength=vocab) + smoothing
        return np.log(counts_V / counts_V.sum())

    return (log_shares(inside) - log_shares(outside)).astype(np.float32)
