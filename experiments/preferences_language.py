"""A language whose reward is known: strings of Markov chains, one for each prompt, worth the letters that they hold."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lmlab.core.types import Array, Key, Objective, Params, TokenBatch
from lmlab.models.config import AttentionConfig, MLPConfig, TransformerConfig
from lmlab.models.lm import LM
from lmlab.objectives.next_token import next_token
from lmlab.optim.chain import build_optimizer
from lmlab.optim.config import OptimConfig, ScheduleConfig
from lmlab.train.state import new_state
from lmlab.train.step import make_step

KINDS, LETTERS, LONGEST = 4, 6, 10
END, BEGIN = 0, 1
KIND, LETTER = 2, 2 + KINDS
"""Tokens: the end, the beginning, kinds of prompts, letters."""
VOCAB = LETTER + LETTERS
BATCH = 64


@dataclass(frozen=True)
class Sizes:
    """How much is trained."""

    seeds: int
    pairs: int
    language_steps: int
    steps: int
    rate: float


LM_CONFIG = TransformerConfig(
    vocab_size=VOCAB, layers=2, width=64, max_length=LONGEST + 4, attention=AttentionConfig(heads=4),
    mlp=MLPConfig(width=128),
)  # fmt: skip


def reward(kinds_B: Array, answers_BT: Array) -> Array:
    """One for each letter that is the prompt's own, and -0.1 for each letter."""
    own_BT = answers_BT == (LETTER + kinds_B % LETTERS)[:, None]
    return jnp.sum(own_BT, axis=1) - 0.1 * jnp.sum(answers_BT >= LETTER, axis=1)


def counted(answers_BT: Array) -> Array:
    """Which tokens belong to an answer: all up to its end."""
    ends_BT = (answers_BT == END).astype(jnp.int32)
    return jnp.cumsum(ends_BT, axis=1) - ends_BT == 0


def prompts(kinds_B: Array) -> Array:
    """Tokens [B, 2] of the prompts."""
    return jnp.stack([jnp.full_like(kinds_B, BEGIN), KIND + kinds_B], axis=1)


def sample(lm: LM, params: Params, kinds_B: Array, key: Key) -> Array:
    """Answers [B, LONGEST + 1] that the model gives; after an end there are ends, and what is longer is cut."""
    hidden_BTD, cache = lm.apply(params, prompts(kinds_B), cache=lm.init_cache(len(kinds_B), LONGEST + 3))

    def draw(carry: Any, key: Key) -> tuple[Any, Array]:
        hidden_BD, cache, over_B = carry
        token_B = jnp.where(over_B, END, jax.random.categorical(key, lm.logits(params, hidden_BD))).astype(jnp.int32)
        hidden_B1D, cache = lm.apply(params, token_B[:, None], cache=cache)
        return (hidden_B1D[:, 0], cache, over_B | (token_B == END)), token_B

    start = hidden_BTD[:, -1], cache, jnp.zeros(kinds_B.shape, bool)
    return jax.lax.scan(draw, start, jax.random.split(key, LONGEST + 1))[1].T


def logprobs(lm: LM, params: Params, kinds_B: Array, answers_BT: Array) -> Array:
    """Log-probability [B] of answers."""
    rows_BT = jnp.concatenate([prompts(kinds_B), answers_BT], axis=1)
    hidden_BTD, _ = lm.apply(params, rows_BT[:, :-1])
    chosen_BT = jnp.take_along_axis(jax.nn.log_softmax(lm.logits(params, hidden_BTD)), rows_BT[:, 1:, None], axis=-1)
    return jnp.sum(jnp.where(counted(answers_BT), chosen_BT[:, 1:, 0], 0), axis=1)


def language(logits_KLL: Array, key: Key, count: int) -> tuple[Array, Array]:
    """Kinds [B] and answers of Markov chains over letters, one a kind; an answer ends with chance 0.15 a letter."""
    firsts, kinds, walk, ends = jax.random.split(key, 4)
    kinds_B = jax.random.randint(kinds, (count,), 0, KINDS)
    first_B = jax.random.randint(firsts, (count,), 0, LETTERS)

    def step(letter_B: Array, key: Key) -> tuple[Array, Array]:
        following_B = jax.random.categorical(key, logits_KLL[kinds_B, letter_B])
        return following_B, letter_B

    letters_BT = jax.lax.scan(step, first_B, jax.random.split(walk, LONGEST))[1].T
    lengths_B = 1 + jnp.sum(jnp.cumprod(jax.random.uniform(ends, (count, LONGEST - 1)) > 0.15, axis=1), axis=1)
    answers_BT = jnp.where(jnp.arange(LONGEST)[None] < lengths_B[:, None], LETTER + letters_BT, END)
    return kinds_B, jnp.pad(answers_BT, ((0, 0), (0, 1))).astype(jnp.int32)


def train(
    objective: Objective, lm: LM, start: Params, batches: Callable[[Array], Any], steps: int, rate: float
) -> Params:
    """Parameters [S, ...] after `steps` steps from `start`. batches: `batches(i)`, the batch [S, ...] of step i."""
    tx = build_optimizer(OptimConfig(schedule=ScheduleConfig(peak=rate, warmup=0.05), weight_decay=0.0), lm.axes, steps)
    step = make_step(objective, tx)
    states = jax.vmap(lambda params: new_state(params, tx, jax.random.key(0)))(start)
    every = jax.vmap(lambda state, batch: step(state, batch)[0])
    run = jax.jit(lambda states: jax.lax.scan(lambda s, i: (every(s, batches(i)), None), states, jnp.arange(steps))[0])
    return run(states).params


def learned_language(lm: LM, sizes: Sizes) -> Params:
    """Parameters [S, ...] of models that know the language of their seed."""
    chains = jax.random.normal(jax.random.key(0), (sizes.seeds, KINDS, LETTERS, LETTERS))

    def batch(logits_KLL: Array, key: Key) -> TokenBatch:
        kinds_B, answers_BT = language(logits_KLL, key, BATCH)
        rows_BT = jnp.concatenate([prompts(kinds_B), answers_BT], axis=1)
        inside_BT = jnp.concatenate([jnp.ones((BATCH, 2), bool), counted(answers_BT)], axis=1)
        places_BT = jnp.broadcast_to(jnp.arange(rows_BT.shape[1])[None], rows_BT.shape)
        return TokenBatch(rows_BT, inside_BT.astype(jnp.int32), places_BT, inside_BT & (places_BT > 1))

    def batches(i: Array) -> TokenBatch:
        return jax.vmap(batch)(chains, jax.random.split(jax.random.fold_in(jax.random.key(2), i), sizes.seeds))

    start = jax.vmap(lm.init)(jax.random.split(jax.random.key(1), sizes.seeds))
    return train(next_token(lm), lm, start, batches, sizes.language_steps, 3e-3)
