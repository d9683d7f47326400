"""Growing keeps the function exactly where the paper's algebra says so, and nowhere else."""

from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import pytest

from lmlab.core.errors import UserError
from lmlab.models.config import GrowthConfig, ParameterTokens
from lmlab.models.growth import grow_params, grown_config
from lmlab.models.pattention import score_weights
from lmlab.models.tokenformer import tokenformer
from lmlab.testing.tiny import lively, tiny_tokenformer_config

SMALL = tiny_tokenformer_config()
PARAMS = lively(tokenformer(SMALL).init(jax.random.key(0)))
MEDIUM, LARGE = ParameterTokens(20, 16, 40), ParameterTokens(21, 30, 64)
TOKENS = jax.random.randint(jax.random.key(1), (2, 6), 0, 7)
KEY = jax.random.key(5)
PAPER = GrowthConfig()


def grown(counts=MEDIUM, growth=PAPER, small=SMALL, params=PARAMS):
    config = grown_config(small, counts, growth)
    return config, grow_params(params, small, config, KEY, growth)


def logits(config, params, tokens=TOKENS):
    lm = tokenformer(config)
    return jax.jit(lambda p: lm.logits(p, lm.apply(p, tokens)[0]))(params)


def decoded(config, params):
    """Logits of the tokens read one by one through the cache."""
    lm = tokenformer(config)
    cache, step = lm.init_cache(2, 6), jax.jit(lambda p, token, cache: lm.apply(p, token, cache=cache))
    pieces = []
    for i in range(6):
        hidden, cache = step(params, TOKENS[:, i : i + 1], cache)
        pieces.append(lm.logits(params, hidden))
    return jnp.concatenate(pieces, axis=1)


def assert_same(got, wanted, growths=1):
    """To 1e-6 of the largest logit a growth: sums over more parameter tokens round otherwise, as in another order."""
    chex.assert_trees_all_close(got, wanted, atol=growths * 1e-6 * float(jnp.max(jnp.abs(wanted))), rtol=0)


@pytest.mark.parametrize("counts", [MEDIUM, ParameterTokens(12, 8, 40)], ids=["all", "ffn_only"])
def test_new_keys_of_zero_keep_the_function(counts):
    config, params = grown(counts)
    shapes = jax.eval_shape(tokenformer(config).init, KEY)
    chex.assert_trees_all_equal_shapes_and_dtypes(params, shapes)
    assert_same(logits(config, params), logits(SMALL, PARAMS))
    assert_same(decoded(config, params), decoded(SMALL, PARAMS))
    # Whatever the new values are.
    other = jax.tree.map(lambda leaf: leaf, params)
    for part in ("out", "ffn"):
        old = PARAMS["layers"][part]["values"].shape[1]
        other["layers"][part]["values"] = params["layers"][part]["values"].at[:, old:].set(100.0)
    assert_same(logits(config, other), logits(SMALL, PARAMS))


def test_so_they_do_where_gelu_comes_before_the_norm():
    small = replace(SMALL, normalisation="gelu_l2_norm")
    config, params = grown(small=small)
    assert_same(logits(config, params), logits(small, PARAMS))
    assert_same(decoded(config, params), decoded(small, PARAMS))


def test_so_does_a_chain_of_growths():
    medium, params = grown()
    large, params = grown(LARGE, small=medium, params=params)
    assert large.references == SMALL.counts
    assert_same(logits(large, params), logits(SMALL, PARAMS), growths=2)
    assert_same(decoded(large, params), decoded(SMALL, PARAMS), growths=2)


@pytest.mark.parametrize(
    ("growth", "kept"),
    [
        (GrowthConfig(values="zeros"), True),
        (GrowthConfig(tau="follow"), False),
        (GrowthConfig(keys="normal", tau="follow"), False),
        (GrowthConfig(keys="normal", values="zeros"), False),
    ],
)
def test_what_else_keeps_the_function(growth, kept):
    difference = jnp.max(jnp.abs(logits(*grown(growth=growth)) - logits(SMALL, PARAMS)))
    assert difference < 1e-5 if kept else difference > 1e-2


def test_a_tau_that_follows_scales_what_gelu_is_given(monkeypatch):
    x, layer = jax.random.normal(KEY, (1, 2, 16)), PARAMS["layers"]["ffn"]
    config, params = grown(growth=GrowthConfig(tau="follow"))
    given = []
    monkeypatch.setattr(jax.nn, "gelu", lambda x, approximate: given.append(x) or x)
    for each, tokens in ((layer, SMALL.references.ffn), (params["layers"]["ffn"], config.references.ffn)):
        score_weights(x @ each["keys"][0], tokens**0.5, config)
    before, after = given
    chex.assert_trees_all_close(after[..., :24], before * (40 / 24) ** 0.5, rtol=1e-5)
    assert not after[..., 24:].any()


def slopes(config, params):
    lm = tokenformer(config)
    loss = lambda p: jnp.sum(jnp.sin(lm.logits(p, lm.apply(p, TOKENS)[0])))
    return jax.jit(jax.grad(loss))(params)


def parts(tree, small=SMALL):
    """Gradients of the old keys and values, of the new keys, and of the new values."""
    axes = tokenformer(small).axes
    old, new_keys, new_values = [], [], []
    for (path, leaf), names in zip(
        jax.tree_util.tree_leaves_with_path(tree),
        jax.tree.leaves(axes, is_leaf=lambda leaf: isinstance(leaf, tuple)),
        strict=True,
    ):
        if "param_tokens" not in names:
            old.append(leaf)
            continue
        axis = names.index("param_tokens")
        node = PARAMS
        for step in path:
            node = node[step.key]
        size = node.shape[axis]
        old.append(jax.lax.slice_in_dim(leaf, 0, size, axis=axis))
        (new_keys if axis == len(names) - 1 else new_values).append(
            jax.lax.slice_in_dim(leaf, size, leaf.shape[axis], axis=axis)
        )
    return old, new_keys, new_values


def test_old_parameters_learn_as_before_and_new_keys_begin_to():
    old, new_keys, new_values = parts(slopes(*grown()))
    chex.assert_trees_all_close(old, parts(slopes(SMALL, PARAMS))[0], atol=1e-5, rtol=1e-4)
    assert all(jnp.all(jnp.any(slope != 0, axis=-1)) for slope in new_keys)
    assert not any(slope.any() for slope in new_values)


def test_keys_and_values_of_zero_never_learn():
    _, new_keys, new_values = parts(slopes(*grown(growth=GrowthConfig(values="zeros"))))
    assert not any(slope.any() for slope in [*new_keys, *new_values])


def test_new_tokens_are_drawn_as_those_of_a_new_model():
    config, params = grown(growth=GrowthConfig(keys="normal", tau="follow"))
    fresh = tokenformer(config).init(KEY)
    for leaf in ("keys", "values"):
        ours, drawn = params["layers"]["ffn"][leaf], fresh["layers"]["ffn"][leaf]
        axis = 2 if leaf == "keys" else 1
        last = lambda x, axis=axis: jax.lax.slice_in_dim(x, 24, 40, axis=axis)
        chex.assert_trees_all_equal(last(ours), last(drawn))
    assert config.references == MEDIUM
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    assert {x.dtype for x in jax.tree.leaves(grown(params=half)[1])} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 32}, "model.width = 32: expected 16, as in the model that grows"),
        ({"layers": 3}, "model.layers = 3: expected 2"),
        ({"parameter_tokens": ParameterTokens(12, 7, 24)}, r"model.parameter_tokens.proj = 7: expected at least 8"),
    ],
)
def test_what_is_no_growth_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        grow_params(PARAMS, SMALL, replace(SMALL, **changes), KEY, GrowthConfig())


def test_softmax_is_refused():
    # A key of zero has the weight exp(0) there.
    with pytest.raises(UserError, match=r"model.normalisation = 'softmax'.*a new key of zero has weight"):
        grown(small=replace(SMALL, normalisation="softmax"))
