"""What the paper says of attention to parameters, exactly (shared names as in `lmlab.models.pattention`)."""

from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmlab.core.errors import UserError
from lmlab.core.masking import self_attention_mask
from lmlab.models.attention import reference_attention
from lmlab.models.config import AttentionConfig, ParameterTokens, TokenFormerConfig
from lmlab.models.flops import training_flops_per_token
from lmlab.models.layers import standardise
from lmlab.models.pattention import Pattention, QueryKeyValue, attend_to_parameters, score_weights
from lmlab.models.tokenformer import tokenformer
from lmlab.models.tokenformer_sizes import SIZES
from lmlab.optim.groups import MatrixAxes, matrix_axes
from lmlab.testing.tiny import lively, tiny_tokenformer, tiny_tokenformer_config

PAPER = TokenFormerConfig()
D, P, E = 5, 8, 6
X, KEYS, VALUES = (
    jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(2, 3, D), (D, P), (P, E)])
)  # fmt: skip


def pattention(x, keys, values, tau=P**0.5, config=PAPER):
    return attend_to_parameters(x, keys, values, tau, config)


def test_the_scale_of_tokens_and_keys_does_not_matter():
    wanted = pattention(X, KEYS, VALUES)
    chex.assert_trees_all_close(pattention(7 * X, KEYS, VALUES), wanted, atol=1e-6)
    chex.assert_trees_all_close(pattention(X, 7 * KEYS, VALUES), wanted, atol=1e-6)
    assert not np.allclose(pattention(-X, KEYS, VALUES), wanted, atol=1e-2)


def test_the_order_of_parameter_tokens_does_not_matter():
    order = jax.random.permutation(jax.random.key(3), P)
    wanted = pattention(X, KEYS, VALUES)
    chex.assert_trees_all_close(pattention(X, KEYS[:, order], VALUES[order]), wanted, atol=1e-6)


def test_repeated_parameter_tokens_share_their_value_where_tau_follows():
    wanted = pattention(X, KEYS, VALUES)
    repeated = pattention(X, jnp.tile(KEYS, (1, 3)), jnp.tile(VALUES, (3, 1)) / 3, (3 * P) ** 0.5)
    chex.assert_trees_all_close(repeated, wanted, atol=1e-6)


def test_one_parameter_token_knows_the_sign_alone():
    key, value = KEYS[:, :1], VALUES[:1]
    wanted = jax.nn.gelu(jnp.sign(X @ key), approximate=False) @ value
    chex.assert_trees_all_close(pattention(X, key, value, 1.0), wanted, atol=1e-6)


@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_what_gelu_is_given_has_the_norm_tau(monkeypatch, tau):
    given = []
    monkeypatch.setattr(jax.nn, "gelu", lambda x, approximate: given.append(x) or x)
    score_weights(X @ KEYS, tau, PAPER)
    chex.assert_trees_all_close(jnp.linalg.norm(given[0], axis=-1), jnp.full((2, 3), tau), rtol=1e-6)


def test_tokens_do_not_see_each_other():
    alone = pattention(X[1:, 2:], KEYS, VALUES)
    chex.assert_trees_all_close(pattention(X, KEYS, VALUES)[1:, 2:], alone, atol=1e-6)


def test_ablations_are_what_they_say():
    scores, config = X @ KEYS, lambda name: replace(PAPER, normalisation=name)
    softmax = P * jax.nn.softmax(scores, axis=-1) @ VALUES
    chex.assert_trees_all_close(pattention(X, KEYS, VALUES, config=config("softmax")), softmax, rtol=1e-5)
    gelu = jax.nn.gelu(scores, approximate=False)
    wanted = gelu / jnp.linalg.norm(gelu, axis=-1, keepdims=True) * P**0.5 @ VALUES
    chex.assert_trees_all_close(pattention(X, KEYS, VALUES, config=config("gelu_l2_norm")), wanted, rtol=1e-5)


def test_the_tanh_form_of_gelu_is_near_and_not_the_same():
    one, other = (pattention(X, KEYS, VALUES, config=replace(PAPER, gelu=name)) for name in ("exact", "tanh"))
    assert 0 < jnp.max(jnp.abs(one - other)) < 1e-2


@pytest.mark.parametrize("normalisation", ["l2_norm_gelu", "gelu_l2_norm", "softmax"])
def test_nothing_is_divided_by_zero(normalisation):
    config = replace(PAPER, normalisation=normalisation)
    loss = lambda x, keys, values: jnp.sum(jnp.sin(pattention(x, keys, values, config=config)))
    slopes = jax.grad(loss, argnums=(0, 1, 2))
    chex.assert_tree_all_finite(slopes(jnp.zeros_like(X), KEYS, VALUES))
    chex.assert_tree_all_finite(slopes(X, jnp.zeros_like(KEYS), VALUES))
    chex.assert_tree_all_finite(slopes(jnp.zeros_like(X), jnp.zeros_like(KEYS), VALUES))
    scores = jnp.zeros((2, P))
    chex.assert_tree_all_finite(jax.jvp(lambda a: score_weights(a, 2.0, config), (scores,), (scores + 1,)))


def test_a_block_is_the_paper_s():
    # Attention between the same projections by the definition, and the norms and residuals around them.
    config = tiny_tokenformer_config(positions="none")
    lm = tokenformer(config)
    params = lively(lm.init(jax.random.key(0)))
    tokens_BT = jnp.asarray([[1, 2, 3, 4, 5]])
    x = lm.embed(params, tokens_BT)
    norm = lambda x: standardise(x, "layer", config.norm_eps)
    for number in range(config.layers):
        layer = jax.tree.map(lambda leaf, number=number: leaf[number], params["layers"])
        qkv = QueryKeyValue(config).apply({"params": layer["attention"]}, norm(x))
        seen = reference_attention(*qkv, self_attention_mask(jnp.arange(5)[None]))
        x = x + Pattention(config, 8, 8).apply({"params": layer["out"]}, seen.reshape(1, 5, -1))
        x = x + Pattention(config, 24, 24).apply({"params": layer["ffn"]}, norm(x))
    last = params["final_norm"]
    wanted = norm(x) * last["scale"][None, None] + last["bias"][None, None]
    chex.assert_trees_all_close(lm.apply(params, tokens_BT)[0], wanted, atol=1e-5)


def test_queries_keys_and_values_are_normed_each_for_itself():
    config = tiny_tokenformer_config()
    module, x = QueryKeyValue(config), jax.random.normal(jax.random.key(0), (1, 4, 16))
    params = lively(jax.tree.map(lambda leaf: leaf.value, module.init(jax.random.key(0), x)["params"],
                                 is_leaf=lambda leaf: hasattr(leaf, "value")))  # fmt: skip
    for i, (name, got) in enumerate(zip(("query", "key", "value"), module.apply({"params": params}, x), strict=True)):
        wanted = pattention(x, params["keys"][:, i], params[f"{name}_values"], 12**0.5)
        chex.assert_trees_all_close(got, wanted.reshape(1, 4, 4, 4), atol=1e-5)


def test_against_the_authors_lines_in_torch():
    torch = pytest.importorskip("torch", reason="parity needs torch (the extra peers)")
    x, keys, values = (torch.tensor(np.asarray(a)) for a in (X, KEYS, VALUES))
    scores = x @ keys
    scores = scores / scores.norm(dim=-1, keepdim=True) * P**0.5
    wanted = torch.nn.functional.gelu(scores) @ values
    chex.assert_trees_all_close(np.asarray(pattention(X, KEYS, VALUES)), wanted.numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("pile_150m", 151.9), ("pile_450m", 454.2), ("pile_900m", 903.3), ("pile_1500m", 1587.2), ("owt_124m", 123.6),
        ("owt_354m", 354.2), ("owt_757m", 753.8), ("owt_1400m", 1309.7), ("owt2_354m", 353.5), ("owt2_757m", 756.2),
    ],
)  # fmt: skip
def test_sizes_have_as_many_parameters_as_the_paper_says(name, millions):
    shapes = jax.eval_shape(tokenformer(SIZES[name]).init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e6 == pytest.approx(millions, abs=0.05)
    config = SIZES[name]
    assert config.counts == ParameterTokens(config.counts.qkv, config.counts.qkv, 4 * config.counts.qkv)


def std(leaf):
    return float(jnp.std(leaf))


def test_initialisations_are_those_of_the_authors():
    sizes = {"width": 64, "layers": 2, "vocab_size": 500, "parameter_tokens": ParameterTokens(256, 128, 512)}
    neox, maxtext = (
        tiny_tokenformer(initialisation=name, **sizes).init(jax.random.key(0)) for name in ("neox", "maxtext")
    )
    assert std(neox["embedding"]) == pytest.approx(0.02, rel=0.05)
    assert std(maxtext["embedding"]) == pytest.approx(1.0, rel=0.05)
    for part, tokens in (("out", 128), ("ffn", 512)):
        assert std(neox["layers"][part]["keys"]) == pytest.approx(0.02, rel=0.05)
        assert std(neox["layers"][part]["values"]) == pytest.approx(2 / (2 * 64**0.5), rel=0.05)
        assert std(maxtext["layers"][part]["keys"]) == pytest.approx(64**-0.5, rel=0.05)
        assert std(maxtext["layers"][part]["values"]) == pytest.approx(tokens**-0.5, rel=0.05)
    assert std(maxtext["layers"]["attention"]["key_values"]) == pytest.approx(256**-0.5, rel=0.05)


def test_maxtext_divides_logits_by_the_root_of_the_width():
    plain, scaled = tiny_tokenformer(), tiny_tokenformer(initialisation="maxtext")
    params, hidden = plain.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (2, 16))
    chex.assert_trees_all_close(scaled.logits(params, hidden), plain.logits(params, hidden) / 4, rtol=1e-6)


def test_keys_and_values_are_matrices_to_muon():
    axes = tiny_tokenformer().axes["layers"]
    assert matrix_axes(axes["attention"]["keys"]) == MatrixAxes((0, 2), (1,), (3,))
    assert matrix_axes(axes["attention"]["query_values"]) == MatrixAxes((0,), (1,), (2,))
    assert matrix_axes(axes["ffn"]["keys"]) == MatrixAxes((0,), (1,), (2,))


def test_flops_count_every_weight_of_a_layer():
    config = tiny_tokenformer_config(attention=AttentionConfig(heads=4, kv_heads=2))
    shapes = jax.eval_shape(tokenformer(config).init, jax.random.key(0))
    weights = sum(leaf.size for leaf in jax.tree.leaves(shapes["layers"]))
    scores, head = 2 * config.layers * 16 * (9 + 1) / 2, 7 * 16
    assert training_flops_per_token(config, 9) == 6 * (weights + scores + head)


def test_devices_along_the_tensor_axis_share_the_weights_and_keep_tau():
    config = tiny_tokenformer_config()
    part = config.part(4)
    assert 4 * part.layer_weights == config.layer_weights
    assert part.references == config.counts
    assert part.head_dim == config.head_dim


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": AttentionConfig(heads=4, qkv_bias=True)}, "model.attention.qkv_bias = True: expected False"),
        ({"attention": AttentionConfig(heads=4, qk_norm=True)}, "model.attention.qk_norm = True: expected False"),
        ({"parameter_tokens": ParameterTokens(qkv=-1)}, "model.parameter_tokens.qkv = -1"),
        ({"score_eps": 0.0}, "model.score_eps = 0.0"),
        ({"width": 18}, "model.attention.heads = 4: expected a divisor of model.width = 18"),
    ],
)
def test_what_such_a_model_does_not_have_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        tiny_tokenformer_config(**changes)
