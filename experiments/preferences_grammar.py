"""A language whose reward is known: strings of Markov chains, one for each prompt, worth the letters that they hold.

A small model learns the language; pairs are drawn from that model and labelled by Bradley and Terry with the true
reward. Then every arm trains on the same pairs, from the same model, which is the reference.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.results import say
from lmlab.core.types import Array, Key, Objective, Params, Preferences, TokenBatch
from lmlab.data.answers import lay_out_pairs, preferences_of
from lmlab.data.preferences import EncodedPair
from lmlab.models.config import AttentionConfig, MLPConfig, TransformerConfig
from lmlab.models.lm import LM
from lmlab.models.transformer import transformer
from lmlab.objectives import pair_losses
from lmlab.objectives.dpo import dpo, kto_objective
from lmlab.objectives.next_token import next_token
from lmlab.objectives.pair_losses import after, per_token
from lmlab.optim.chain import build_optimizer
from lmlab.optim.config import OptimConfig, ScheduleConfig
from lmlab.reference import score_answers
from lmlab.train.state import new_state
from lmlab.train.step import make_step

KINDS, LETTERS, LONGEST = 4, 6, 10
END, BEGIN = 0, 1
KIND, LETTER = 2, 2 + KINDS
"""Tokens: the end, the beginning, kinds of prompts, letters."""
VOCAB = LETTER + LETTERS
SAMPLES = 2000
"""Answers that rewards and divergences are means of."""
BATCH = 64
FLIPS = 0.2


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


@dataclass(frozen=True)
class Labelled:
    """Pairs of one seed, labelled by the true reward."""

    pairs: list[EncodedPair]
    """The first answer is the preferred one."""
    probabilities: np.ndarray
    """That of the label, by Bradley and Terry."""


def labelled_pairs(lm: LM, reference: Params, seed: int, count: int) -> Labelled:
    """Pairs of unequal answers that the reference gives, labelled at random by the true reward."""
    rng = np.random.default_rng(seed)
    kinds = np.tile(rng.integers(0, KINDS, count).astype(np.int32), 2)
    answers = jax.jit(partial(sample, lm))(reference, jnp.asarray(kinds), jax.random.key(100 + seed))
    rewards = np.asarray(reward(jnp.asarray(kinds), answers))
    texts = [
        row[: int(n)] for row, n in zip(np.asarray(answers), np.asarray(counted(answers).sum(axis=1)), strict=True)
    ]
    pairs, chances = [], []
    for i in range(count):
        first, second = (i, i + count) if rng.random() < _sigmoid(rewards[i] - rewards[i + count]) else (i + count, i)
        if not np.array_equal(texts[first], texts[second]):
            prompt = np.asarray([BEGIN, KIND + kinds[i]], np.int32)
            pairs.append(EncodedPair(str(i), prompt, (texts[first], texts[second]), 1.0, 0.0))
            chances.append(_sigmoid(rewards[first] - rewards[second]))
    return Labelled(pairs, np.asarray(chances))


def _sigmoid(x: float) -> float:
    return float(1 / (1 + np.exp(-x)))


def flipped(pairs: list[EncodedPair], share: float, seed: int) -> list[EncodedPair]:
    """The pairs with a share of the labels turned round."""
    turned = np.random.default_rng(seed).random(len(pairs)) < share
    return [
        replace(pair, answers=pair.answers[::-1]) if turn else pair for pair, turn in zip(pairs, turned, strict=True)
    ]


def singles(pairs: list[EncodedPair]) -> list[EncodedPair]:
    """Every answer alone, good or bad, beside an answer to another prompt, as `kto_objective` takes them."""
    others = [pair.answers[0] for pair in pairs[1:] + pairs[:1]]
    return [
        replace(pair, answers=(answer, other), target=1.0 - side)
        for pair, other in zip(pairs, others, strict=True)
        for side, answer in enumerate(pair.answers)
    ]


def as_batch(pairs: list[EncodedPair]) -> Preferences:
    """A row for every pair."""
    rows = replace(lay_out_pairs(pairs, 2 + 2 * (LONGEST + 1), alone=True), labels=2 * (LONGEST + 1))
    return preferences_of(rows, range(rows.rows), rows.rows)


def with_reference(lm: LM, reference: Params, every: list[Preferences]) -> Preferences:
    """Batches of all seeds [S, N, ...], as many rows each as the shortest has, scored under their references."""
    count = min(len(batch.weights_BP) for batch in every)
    stacked = jax.tree.map(lambda *x: jnp.stack([part[:count] for part in x]), *every)
    return stacked.replace(reference_BS=jax.vmap(partial(score_answers, lm, 1.0, 64))(reference, stacked.answers))


@dataclass(frozen=True)
class Arm:
    """One way to learn from the pairs of a seed."""

    objective: Callable[[LM], Objective]
    data: Callable[[list[EncodedPair], int], list[EncodedPair]] = lambda pairs, seed: pairs


def arms() -> dict[str, Arm]:
    """Every arm by name."""
    plain = lambda beta: Arm(lambda lm: dpo(lm, pair_losses.sigmoid, beta))
    flips = lambda pairs, seed: flipped(pairs, FLIPS, seed)
    return {
        "chosen only": Arm(lambda lm: dpo(lm, lambda scores, beta: 0 * scores.chosen, 0.1, sft=1.0)),
        **{f"DPO {beta}": plain(beta) for beta in (0.03, 0.1, 0.3, 1.0)},
        "IPO 0.1": Arm(lambda lm: dpo(lm, after(per_token, pair_losses.ipo), 0.1)),
        "KTO 0.1": Arm(lambda lm: kto_objective(lm, 0.1), lambda pairs, seed: singles(pairs)),
        "DPO 0.1, 20% flips": Arm(lambda lm: dpo(lm, pair_losses.sigmoid, 0.1), flips),
        "robust 0.1, 20% flips": Arm(lambda lm: dpo(lm, partial(pair_losses.robust, flips=FLIPS), 0.1), flips),
        "DPO 0.1, labels shuffled": Arm(
            lambda lm: dpo(lm, pair_losses.sigmoid, 0.1), lambda pairs, seed: flipped(pairs, 0.5, seed)
        ),
    }  # fmt: skip


def run_grammar(sizes: Sizes) -> dict[str, Any]:
    """Reward and divergence of the reference, of the optima that are known in closed form, and of every arm."""
    lm = transformer(LM_CONFIG)
    say("learning the language")
    reference = learned_language(lm, sizes)
    of_seed = lambda params, seed: jax.tree.map(lambda x: x[seed], params)
    labelled = [
        labelled_pairs(lm, of_seed(reference, s), s, sizes.pairs + sizes.pairs // 4) for s in range(sizes.seeds)
    ]
    cut = [int(0.8 * len(one.pairs)) for one in labelled]
    held = with_reference(lm, reference, [as_batch(one.pairs[n:]) for one, n in zip(labelled, cut, strict=True)])
    found: dict[str, Any] = {
        "arms": {},
        "reference": measure(lm, reference, reference),
        "optima": optima(lm, reference),
    }
    for name, arm in arms().items():
        say(name)
        pairs = [arm.data(one.pairs[:n], s) for s, (one, n) in enumerate(zip(labelled, cut, strict=True))]
        data = with_reference(lm, reference, [as_batch(part) for part in pairs])
        rows = data.weights_BP.shape[1]

        def batches(i: Array, data: Preferences = data, rows: int = rows) -> Preferences:
            chosen = jax.random.randint(jax.random.fold_in(jax.random.key(3), i), (BATCH,), 0, rows)
            return jax.tree.map(lambda x: x[:, chosen], data)

        params = train(arm.objective(lm), lm, reference, batches, sizes.steps, sizes.rate)
        found["arms"][name] = measure(lm, params, reference) | {"accuracy": accuracy(lm, params, held)}
    return found


def measure(lm: LM, params: Params, reference: Params) -> dict[str, list[float]]:
    """Mean reward of what a policy says, and its divergence KL(policy || reference), by seed."""
    kinds_B = jnp.arange(SAMPLES) % KINDS

    def one(params: Params, reference: Params) -> tuple[Array, Array]:
        answers = sample(lm, params, kinds_B, jax.random.key(7))
        ratios = logprobs(lm, params, kinds_B, answers) - logprobs(lm, reference, kinds_B, answers)
        return jnp.mean(reward(kinds_B, answers)), jnp.mean(ratios)

    rewards, divergences = jax.jit(jax.vmap(one))(params, reference)
    return {"reward": rewards.tolist(), "kl": divergences.tolist()}


def optima(lm: LM, reference: Params) -> list[dict[str, float]]:
    """Reward and divergence of reference * exp(reward / beta) / Z: averages over answers of the reference, reweighted.

    Means over seeds; strengths at which fewer than 200 answers carry the average are left out.
    """
    kinds_B = jnp.arange(32 * SAMPLES) % KINDS
    draw = jax.jit(lambda params: reward(kinds_B, sample(lm, params, kinds_B, jax.random.key(8))))
    rewards_SKN = jnp.stack([draw(jax.tree.map(lambda x, s=s: x[s], reference)).reshape(-1, KINDS).T
                             for s in range(len(jax.tree.leaves(reference)[0]))])  # fmt: skip
    points = []
    for beta in np.geomspace(0.2, 10, 40):
        weights = jax.nn.softmax(rewards_SKN / beta, axis=-1)
        if float(jnp.min(1 / jnp.sum(jnp.square(weights), axis=-1))) < 200:
            continue
        kl = jnp.sum(weights * jnp.log(jnp.maximum(weights * weights.shape[-1], 1e-30)), axis=-1)
        points.append({"beta": float(beta), "reward": float(jnp.mean(jnp.sum(weights * rewards_SKN, axis=-1))),
                       "kl": float(jnp.mean(kl))})  # fmt: skip
    return points


def accuracy(lm: LM, params: Params, held: Preferences) -> list[float]:
    """Share of held-out pairs in which the implicit reward prefers what the label prefers, by seed."""
    objective = dpo(lm, pair_losses.sigmoid, 0.1)
    ratio = jax.jit(jax.vmap(lambda params, batch: objective(params, batch, jax.random.key(0)).metrics["accuracy"]))
    found = ratio(params, held)
    return (found.sum / found.weight).tolist()
