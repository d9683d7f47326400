"""Reward models: where the reward is read, what padding changes, types, heads on features."""

import math
from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmlab.core.types import AnswerBatch
from lmlab.models.config import ExecutionConfig
from lmlab.models.reward import linear_head, mlp_head, reward_model
from lmlab.objectives.reward import reward_pairs
from lmlab.optim.precision import cast_parameters
from lmlab.testing.tables import LMS
from lmlab.testing.tiny import lively, random_preferences, tiny_lm
from lmlab.train.step import ratio_value

KEY = jax.random.key(0)
TOKENS = [3, 1, 4, 1, 5]
"""A prompt of two tokens and an answer of three."""


LENGTH = 12


def one_answer(tokens, before=0, pad=0):
    """The answer in a row, all of one length, with padding on either side."""
    row = np.full((1, LENGTH), pad, np.int32)
    row[0, before : before + len(tokens)] = tokens
    segments, positions = np.zeros_like(row), np.zeros_like(row)
    segments[0, before : before + len(tokens)] = 1
    positions[0, before : before + len(tokens)] = np.arange(len(tokens))
    empty = jnp.zeros((1, 1), jnp.int32)
    ends = jnp.asarray([[before + len(tokens) - 1]])
    return AnswerBatch(*map(jnp.asarray, (row, segments, positions)), None, empty, empty, empty, ends)


@pytest.fixture(scope="module")
def model():
    return reward_model(tiny_lm(), "normal")


@pytest.fixture(scope="module")
def params(model):
    return lively(model.init(KEY))


@pytest.fixture(scope="module")
def rewards(model):
    return jax.jit(model.rewards)


def test_padding_on_either_side_changes_nothing_and_the_last_token_does(model, params, rewards):
    hidden, _ = jax.jit(model.lm.apply)(params, jnp.asarray([TOKENS]))
    alone = float(hidden[0, -1] @ params["reward"]["kernel"])
    # A pad that is a token of the text, here the last one, ends nothing.
    for before, pad in ((0, 0), (LENGTH - len(TOKENS), 0), (2, TOKENS[-1])):
        assert rewards(params, one_answer(TOKENS, before, pad))[0, 0] == pytest.approx(alone, abs=1e-5)
    assert abs(rewards(params, one_answer([*TOKENS[:-1], 6]))[0, 0] - alone) > 1e-3


def test_answers_behind_one_prompt_get_what_each_gets_alone(params, rewards):
    batch = random_preferences()
    rewards_BS = np.asarray(rewards(params, batch.answers))
    answers = jax.tree.map(np.asarray, batch.answers)
    seen = 0
    for b, s in zip(*np.nonzero(answers.ends_BS), strict=True):
        end = answers.ends_BS[b, s]
        mine = (answers.segments_BT[b] == answers.segments_BT[b, end]) & np.isin(
            answers.branches_BT[b], [0, answers.branches_BT[b, end]]
        )
        alone = rewards(params, one_answer(answers.tokens_BT[b, mine].tolist()))[0, 0]
        assert rewards_BS[b, s] == pytest.approx(float(alone), abs=1e-4)
        seen += 1
    assert seen == 14


def test_a_head_of_zeros_has_the_loss_log_2_and_a_gradient():
    model = reward_model(tiny_lm())
    objective = reward_pairs(model.rewards)
    params, batch = model.init(KEY), random_preferences()

    def loss(params):
        return ratio_value(objective(params, batch, KEY).losses["preference"])

    value, slope = jax.jit(jax.value_and_grad(loss))(params)
    assert value == np.float32(math.log(2))
    assert jnp.abs(slope["reward"]["kernel"]).max() > 0
    assert not any(leaf.any() for name, part in slope.items() if name != "reward" for leaf in jax.tree.leaves(part))


def test_a_float32_head_over_a_bfloat16_backbone(params, rewards):
    half = reward_model(tiny_lm(execution=ExecutionConfig(compute_dtype="bfloat16")), "normal")
    batch = random_preferences().answers
    stored = {**cast_parameters(params, "bfloat16_master"), "reward": params["reward"]}
    found, features = jax.jit(lambda p: (half.rewards(p, batch), half.features(p, batch)))(stored)
    chex.assert_type(found, jnp.float32)
    np.testing.assert_allclose(found, rewards(params, batch), atol=0.15)
    # The head is not rounded: its sum is that of float32 numbers.
    kernel = np.asarray(params["reward"]["kernel"])
    np.testing.assert_allclose(found, np.asarray(features) @ kernel, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama_apart", "mistral", "gpt2", "tokenformer", "multi_token"])
def test_any_model_can_have_the_head(name):
    lm = LMS[name]()
    model = reward_model(lm, "normal")
    params = jax.eval_shape(model.init, KEY)
    assert jax.tree.structure(jax.tree.map(lambda x: 0, params)) == jax.tree.structure(
        jax.tree.map(lambda x: 0, model.axes, is_leaf=lambda x: isinstance(x, tuple))
    )
    chex.assert_shape(jax.eval_shape(model.rewards, params, random_preferences().answers), (4, 4))
    # The model itself ignores the head.
    tokens = jnp.asarray([TOKENS])
    with_head = jax.eval_shape(lambda p: lm.apply(p, tokens)[0], params)
    assert with_head.shape == (1, 5, lm.config.width)


def test_a_head_is_added_to_a_trained_model(model):
    trained = model.lm.init(jax.random.key(3))
    params = model.add_head(trained, KEY)
    chex.assert_trees_all_equal({name: part for name, part in params.items() if name != "reward"}, trained)
    wide = replace(model.lm.config, width=1024)
    kernel = reward_model(replace(model.lm, config=wide), "normal").add_head({}, KEY)["reward"]["kernel"]
    assert float(jnp.std(kernel)) == pytest.approx(1 / math.sqrt(1025), rel=0.1)


def test_heads_on_features():
    features = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 4)), jnp.float32)
    linear, mlp = linear_head(4), mlp_head(4, 5)
    np.testing.assert_array_equal(linear.rewards(linear.init(KEY), features), np.zeros((3, 2)))
    params = jax.tree.map(np.asarray, lively(mlp.init(KEY)))
    expected = np.tanh(np.asarray(features) @ params["inner"] + params["bias"]) @ params["kernel"]
    np.testing.assert_allclose(mlp.rewards(params, features), expected, rtol=1e-4, atol=1e-5)
