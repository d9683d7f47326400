"""Preferences in a language whose reward is known: every arm from the same model and the same pairs.

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

from experiments.preferences_language import (
    BATCH,
    BEGIN,
    KIND,
    KINDS,
    LM_CONFIG,
    LONGEST,
    Sizes,
    counted,
    learned_language,
    reward,
    sample,
    train,
)
from experiments.preferences_measure import accuracy, measure, optima
from experiments.results import say
from lmlab.core.types import Array, Objective, Params, Preferences
from lmlab.data.answers import lay_out_pairs, preferences_of
from lmlab.data.preferences import EncodedPair
from lmlab.models.lm import LM
from lmlab.models.transformer import transformer
from lmlab.objectives import pair_losses
from lmlab.objectives.dpo import dpo, kto_objective
from lmlab.objectives.pair_losses import after, per_token
from lmlab.reference import score_answers

FLIPS = 0.2
"""Share of the labels that are turned round where some are."""


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


def singles(pairs: list[EncodedPair], seed: int) -> list[EncodedPair]:
    """Every answer alone, good or bad, beside one to a prompt of another kind, as `kto_objective` takes them."""
    rng, found = np.random.default_rng(seed), []
    for pair in pairs:
        for side, answer in enumerate(pair.answers):
            other = pair
            while np.array_equal(other.prompt, pair.prompt):
                other = pairs[rng.integers(len(pairs))]
            found.append(replace(pair, answers=(answer, other.answers[rng.integers(2)]), target=1.0 - side))
    return found


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
    rows: int = BATCH
    """Of a step; an answer alone is half of a pair."""


def arms() -> dict[str, Arm]:
    """Every arm by name."""
    plain = lambda beta: Arm(lambda lm: dpo(lm, pair_losses.sigmoid, beta))
    flips = lambda pairs, seed: flipped(pairs, FLIPS, seed)
    return {
        "chosen only": Arm(lambda lm: dpo(lm, lambda scores, beta: 0 * scores.chosen, 0.1, sft=1.0)),
        **{f"DPO {beta}": plain(beta) for beta in (0.03, 0.1, 0.3, 1.0)},
        "IPO 0.1": Arm(lambda lm: dpo(lm, after(per_token, pair_losses.ipo), 0.1)),
        "KTO 0.1": Arm(lambda lm: kto_objective(lm, 0.1), singles, rows=2 * BATCH),
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

        def batches(i: Array, data: Preferences = data, size: int = arm.rows) -> Preferences:
            count = data.weights_BP.shape[1]
            chosen = jax.random.randint(jax.random.fold_in(jax.random.key(3), i), (size,), 0, count)
            return jax.tree.map(lambda x: x[:, chosen], data)

        params = train(arm.objective(lm), lm, reference, batches, sizes.steps, sizes.rate)
        found["arms"][name] = measure(lm, params, reference) | {"accuracy": accuracy(lm, params, held)}
    return found
