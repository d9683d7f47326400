"""A reference that follows: renewed now and then, or an average; the trained parameters are as without it."""

import chex
import jax
import numpy as np
import optax
import pytest

from lmlab.objectives.dpo import REFERENCE, dpo
from lmlab.objectives.pair_losses import sigmoid
from lmlab.testing.tiny import lively, random_preferences, tiny_lm
from lmlab.train.follow import following
from lmlab.train.state import new_state
from lmlab.train.step import make_step

LM = tiny_lm()
PARAMS = lively(LM.init(jax.random.key(0)))
TX = optax.sgd(0.1)
BATCH = random_preferences().replace(reference_BS=None)


def policy(state):
    return {name: part for name, part in state.params.items() if name != REFERENCE}


@pytest.mark.parametrize(("rate", "every"), [(1.0, 2), (0.25, 1), (0.0, 1)])
def test_the_reference_is_what_its_rule_says(rate, every):
    step = jax.jit(following(make_step(dpo(LM, sigmoid, 0.3), TX), REFERENCE, rate=rate, every=every))
    plain = jax.jit(make_step(dpo(LM, sigmoid, 0.3), TX))
    state = new_state({**PARAMS, REFERENCE: PARAMS}, TX, jax.random.key(0), still=(REFERENCE,))
    wanted = PARAMS
    for number in range(1, 4):
        # From the same state the plain step moves the policy alike.
        alone, _ = plain(state, BATCH)
        state, metrics = step(state, BATCH)
        chex.assert_trees_all_close(policy(state), policy(alone), atol=1e-6)
        if number % every == 0:
            wanted = jax.tree.map(lambda a, b: a + rate * (b - a), wanted, policy(state))
        chex.assert_trees_all_close(state.params[REFERENCE], wanted, atol=1e-6)
    assert np.isfinite(metrics["loss"])
