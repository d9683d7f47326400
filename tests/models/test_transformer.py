"""What is particular to the transformer: layouts agree, remat changes nothing, sizes are checked."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmlab.core.errors import UserError
from lmlab.models.config import AttentionConfig, ExecutionConfig, MLPConfig, RotaryConfig, TransformerConfig
from lmlab.models.flops import training_flops_per_token
from lmlab.models.rotary import rotary_frequencies, rotary_table, rotate
from lmlab.models.transformer import transformer
from lmlab.testing.tiny import lively, tiny_config, tiny_lm

TOKENS = jax.random.randint(jax.random.key(0), (2, 6), 0, 7)


@pytest.mark.parametrize(
    "execution",
    [
        ExecutionConfig(unroll=0),
        ExecutionConfig(unroll=2),
        ExecutionConfig(remat="full"),
        ExecutionConfig(remat="dots"),
    ],
)
def test_execution_changes_no_number(execution):
    plain, other = tiny_lm(layers=4), tiny_lm(layers=4, execution=execution)
    params = lively(plain.init(jax.random.key(0)))
    value = lambda lm: jax.jit(jax.value_and_grad(lambda p: jnp.sum(jnp.sin(lm.apply(p, TOKENS)[0]))))(params)
    chex.assert_trees_all_close(value(plain), value(other), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("remat", ["none", "full", "dots"])
def test_layers_that_lie_apart_are_the_same_model(remat):
    stacked = tiny_lm(layers=4, execution=ExecutionConfig(remat=remat))
    apart = tiny_lm(layers=4, execution=ExecutionConfig(remat=remat, stacked=False))
    params = lively(stacked.init(jax.random.key(0)))
    alone = stacked.for_decoding(params)[1]
    value = lambda lm, p: jax.jit(jax.value_and_grad(lambda p: jnp.sum(jnp.sin(lm.apply(p, TOKENS)[0]))))(p)
    (loss, slopes), (same, slopes_apart) = value(stacked, params), value(apart, alone)
    chex.assert_trees_all_close(loss, same, atol=1e-4, rtol=1e-5)
    together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(slopes_apart[f"layers_{i}"] for i in range(4)))
    chex.assert_trees_all_close(slopes["layers"], together, atol=1e-4, rtol=1e-4)


def test_the_form_for_decoding_is_built_once():
    lm = tiny_lm()
    params = lm.init(jax.random.key(0))
    (one, split), (again, _) = lm.for_decoding(params), lm.for_decoding(params)
    assert one is again
    assert one.for_decoding(split) == (one, split)


def test_remat_keeps_less():
    def kept(remat: str) -> int:
        lm = tiny_lm(layers=8, execution=ExecutionConfig(remat=remat))
        params = jax.eval_shape(lm.init, jax.random.key(0))
        tokens = jax.ShapeDtypeStruct((8, 32), jnp.int32)
        grad = jax.grad(lambda p, t: jnp.sum(lm.apply(p, t)[0]))
        return jax.jit(grad).lower(params, tokens).compile().memory_analysis().temp_size_in_bytes

    assert kept("full") < kept("dots") < kept("none")


def test_parameter_count_of_the_benchmark_llama():
    lm = transformer(
        TransformerConfig(
            vocab_size=4096,
            layers=6,
            width=384,
            attention=AttentionConfig(heads=6),
            mlp=MLPConfig(width=1024),
        )
    )
    shapes = jax.eval_shape(lm.init, jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == 12_194_688


def test_flops_against_the_compiler():
    # One layer, so that the scan body is counted once and once only. The compiler adds what is not matmul.
    config = tiny_config(layers=1, width=64, mlp=MLPConfig(width=256), vocab_size=512, max_length=64)
    lm = transformer(config)

    def loss(params, tokens):
        return jnp.sum(lm.logits(params, lm.apply(params, tokens)[0]))

    params = jax.eval_shape(lm.init, jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((4, 64), jnp.int32)
    counted = jax.jit(jax.grad(loss)).lower(params, tokens).compile().cost_analysis()["flops"] / (4 * 64)
    ours = training_flops_per_token(config, 64)
    assert 0.9 < counted / ours < 1.25


def test_rotation_depends_on_distance_only():
    config = RotaryConfig()
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))

    def score(i: int, j: int) -> jax.Array:
        turn = lambda x, place: rotate(x, rotary_table(config, 8, jnp.full((1, 1), place)), "half")
        return jnp.sum(turn(q, i) * turn(k, j))

    assert np.isclose(score(5, 3), score(12, 10), atol=1e-5)
    assert not np.isclose(score(5, 3), score(5, 4), atol=1e-3)


def test_adjacent_pairs_are_a_permutation_of_half_split():
    x = jax.random.normal(jax.random.key(0), (1, 3, 2, 8))
    table = rotary_table(RotaryConfig(), 8, jnp.arange(3)[None])
    order = np.asarray([0, 2, 4, 6, 1, 3, 5, 7])
    chex.assert_trees_all_close(
        rotate(x, table, "adjacent")[..., order], rotate(x[..., order], table, "half"), atol=1e-6
    )


def test_partial_rotation_passes_the_rest():
    x = jax.random.normal(jax.random.key(0), (1, 3, 2, 8))
    turned = rotate(x, rotary_table(RotaryConfig(fraction=0.5), 8, jnp.arange(3)[None]), "half")
    chex.assert_trees_all_equal(turned[..., 4:], x[..., 4:])
    assert jnp.all(turned[:, 1:, :, :4] != x[:, 1:, :, :4])


def test_layers_that_do_not_rotate():
    params = lively(tiny_lm().init(jax.random.key(0)))
    hidden = lambda **changes: tiny_lm(**changes).apply(params, TOKENS)[0]
    chex.assert_trees_all_equal(hidden(rotary=RotaryConfig(skipped_layers=(0, 1))), hidden(positions="none"))
    outputs = [hidden(rotary=RotaryConfig(skipped_layers=skipped)) for skipped in ((), (0,), (1,), (0, 1))]
    assert all(not np.allclose(a, b, atol=1e-3) for i, a in enumerate(outputs) for b in outputs[:i])


def test_llama3_scaling_keeps_short_waves_and_slows_long_ones():
    config = RotaryConfig(base=500_000.0, scaling="llama3", factor=8.0, original_length=8192)
    plain, scaled = rotary_frequencies(RotaryConfig(base=500_000.0), 128), rotary_frequencies(config, 128)
    wavelength = 2 * np.pi / plain
    short, long = wavelength < 8192 / 4, wavelength > 8192
    assert np.allclose(scaled[short], plain[short])
    assert np.allclose(scaled[long], plain[long] / 8)
    between = ~short & ~long
    assert between.any()
    assert np.all((scaled[between] < plain[between]) & (scaled[between] > plain[between] / 8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rotary": RotaryConfig(skipped_layers=(2,))}, "skipped_layers = .*: expected layers from 0 to 1"),
        ({"width": 18}, "model.attention.heads = 4: expected a divisor of model.width = 18"),
        ({"attention": AttentionConfig(heads=4, kv_heads=3)}, "model.attention.kv_heads = 3"),
        ({"attention": AttentionConfig(heads=4, head_dim=3)}, "model.attention.head_dim = 3"),
        ({"layers": 0}, "model.layers = 0"),
    ],
)
def test_sizes_that_do_not_fit_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        tiny_config(**changes)


def test_sequence_beyond_learned_positions_is_refused():
    lm = tiny_lm(positions="learned", max_length=4)
    with pytest.raises(UserError, match=r"sequence length = 6: expected at most model.max_length = 4"):
        lm.apply(lm.init(jax.random.key(0)), TOKENS)
