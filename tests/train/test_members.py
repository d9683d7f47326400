"""Members of an ensemble side by side are what each is alone, and see their own rows only."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from lmlab.core.types import Preferences
from lmlab.models.reward import mlp_head
from lmlab.objectives.reward import reward_pairs
from lmlab.train.members import new_members, shuffled_rows, train_members
from lmlab.train.state import new_state
from lmlab.train.step import make_step

RNG = np.random.default_rng(0)
HEAD, TX = mlp_head(3, 4), optax.adam(1e-2)
STEP = make_step(reward_pairs(HEAD.rewards), TX)
FEATURES = jnp.asarray(RNG.normal(size=(10, 2, 3)), jnp.float32)
TARGETS = jnp.asarray(RNG.random((3, 10, 1)), jnp.float32)
ONES = jnp.ones((10, 1))
KEYS = jax.random.split(jax.random.key(0), 3)


def test_each_member_is_what_it_would_be_alone():
    rows = RNG.integers(0, 10, (4, 3, 5)).astype(np.int32)
    data = Preferences(FEATURES, ONES, TARGETS, 0 * ONES, None)
    own = Preferences(None, None, 0, None, None)
    together = train_members(STEP, new_members(HEAD.init, TX, KEYS), data, jnp.asarray(rows), own)
    step = jax.jit(STEP)
    for member in range(3):
        state = new_state(HEAD.init(KEYS[member]), TX, KEYS[member])
        mine = Preferences(FEATURES, ONES, TARGETS[member], 0 * ONES, None)
        for batch in rows[:, member]:
            state, _ = step(state, jax.tree.map(lambda x, batch=batch: x[batch], mine))
        chex.assert_trees_all_close(jax.tree.map(lambda x, m=member: x[m], together.params), state.params, atol=1e-6)
    assert together.step.tolist() == [4, 4, 4]


def test_shared_data_need_no_word():
    rows = jnp.asarray(RNG.integers(0, 10, (2, 3, 5)), jnp.int32)
    data = Preferences(FEATURES, ONES, ONES, 0 * ONES, None)
    states = train_members(STEP, new_members(HEAD.init, TX, KEYS), data, rows)
    chex.assert_tree_all_finite(states.params)


def test_rows_are_epochs_of_shuffles_of_what_is_allowed():
    allowed = np.asarray([[True] * 10, [True] * 8 + [False] * 2])
    rows = shuffled_rows(allowed, 3, 4, np.random.default_rng(0))
    assert rows.shape == (3 * 2, 2, 4)
    for member, may in enumerate(allowed):
        for epoch in range(3):
            mine = rows[2 * epoch : 2 * epoch + 2, member].ravel()
            assert len(set(mine)) == 8
            assert may[mine].all()
    assert not (rows[:2] == rows[2:4]).all()


def test_fewer_rows_than_a_batch_are_repeated():
    rows = shuffled_rows(np.asarray([[True, True, False]]), 2, 5, np.random.default_rng(0))
    assert rows.shape == (2, 1, 5)
    assert set(rows.ravel()) == {0, 1}
