"""Parameters in bfloat16: what is stored is right to the last bit, or on average, and composes as optax does."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lmlab.core.errors import UserError
from lmlab.objectives.next_token import next_token
from lmlab.optim.chain import build_optimizer
from lmlab.optim.config import OptimConfig
from lmlab.optim.groups import path_name
from lmlab.optim.precision import MasterState, cast_parameters, master_weights, round_by_noise, stochastic_rounding
from lmlab.testing.tiny import lively, random_batch, tiny_lm

LM = tiny_lm()
LARGEST = 0x7F7F0000
"""Bits of the largest bfloat16, as a float32."""
SPECIAL = [0, 1, 0x8000, 0xFFFF, 0x10000, 0x7F8000, 0x800000, 0x3F800000, LARGEST, LARGEST + 1, 0x7F7FFFFF]
"""Bits of zero, subnormals, the least normal, one, the largest bfloat16 and what lies beyond it."""
BOTH = pytest.mark.parametrize("wrap", [master_weights, stochastic_rounding])


def floats(bits) -> jax.Array:
    """Float32 of these bits; arithmetic would flush what is subnormal."""
    return jax.lax.bitcast_convert_type(jnp.asarray(bits, jnp.uint32), jnp.float32)


def words(x) -> np.ndarray:
    return np.asarray(x).view(f"uint{8 * x.dtype.itemsize}")


def exact(x) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def random_floats(count: int, seed: int, low: int = 1, high: int = 254) -> jax.Array:
    """Random sign, mantissa and exponent; `low` and `high` bound the biased exponent."""
    rng = np.random.default_rng(seed)
    parts = rng.integers(0, 2, count) << 31 | rng.integers(low, high + 1, count) << 23 | rng.integers(0, 1 << 23, count)
    return floats(parts.astype(np.uint32))


def run(tx, params, grads, steps=1):
    """Parameters and state after some steps with the same gradient."""

    def one(carry, _):
        updates, state = tx.update(grads, carry[1], carry[0])
        return (optax.apply_updates(carry[0], updates), state), None

    return jax.jit(lambda params: jax.lax.scan(one, (params, tx.init(params)), length=steps)[0])(params)


@pytest.mark.parametrize("negative", [0, 1 << 31])
def test_the_mean_over_all_noise_is_the_number(negative):
    bits = np.asarray([word | negative for word in SPECIAL if word <= LARGEST], np.uint32)
    bits = np.concatenate([bits, words(random_floats(40, 0, 1, 253))])
    noise = jnp.arange(1 << 16, dtype=jnp.uint16)
    rounded = jax.jit(jax.vmap(lambda x: round_by_noise(jnp.full(noise.shape, x), noise)))(floats(bits))
    assert not np.any(words(rounded) & 0xFFFF)
    # One unit of the last place away from zero, for as many values of the noise as the lower half says.
    up = words(rounded) != (bits & 0xFFFF0000)[:, None]
    assert np.all(words(rounded)[up] == np.broadcast_to(bits[:, None] // 0x10000 * 0x10000 + 0x10000, up.shape)[up])
    assert np.array_equal(up.sum(axis=1), bits & 0xFFFF)
    assert np.array_equal(exact(rounded).mean(axis=1), exact(floats(bits)))


def test_what_is_exact_or_not_finite_stays_and_nothing_becomes_infinite():
    noise = jnp.asarray([0, 1, 0x8000, 0xFFFF], jnp.uint16)
    every = lambda bits: words(round_by_noise(jnp.broadcast_to(floats(bits), noise.shape), noise))
    for sign in (0, 1 << 31):
        for bits in (0, 0x10000, 0x800000, 0x3F800000, 0x3F810000, LARGEST, 0x7F800000):
            assert set(every(bits | sign)) == {bits | sign}
        for bits in (LARGEST + 1, 0x7F7FFFFF):
            assert set(every(bits | sign)) == {LARGEST | sign}
        for bits in (0x7FC00000, 0x7F800001, 0x7FFFFFFF):
            assert np.isnan(every(bits | sign).view(np.float32)).all()


def test_drawn_noise_is_unbiased():
    # 200 numbers, each rounded for 10,000 seeds: the number of times up is binomial.
    draws, x = 10_000, random_floats(200, 1, 100, 130)
    tx = stochastic_rounding(optax.identity(), 0)
    state = tx.init({"w": jnp.zeros(200, jnp.bfloat16)})

    def draw(seed):
        tx = stochastic_rounding(optax.identity(), seed)
        zeros = {"w": jnp.zeros(200, jnp.bfloat16)}
        return optax.apply_updates(zeros, tx.update({"w": x}, state, zeros)[0])["w"]

    drawn = jax.jit(jax.vmap(draw))(jnp.arange(draws))
    share = (words(x) & 0xFFFF) / 2**16
    up = np.sum(words(drawn) != words(x) >> 16, axis=0)
    z = (up - draws * share) / np.sqrt(draws * share * (1 - share))
    assert np.abs(z).max() < 4.5
    assert 0.8 < z.std() < 1.2
    # Neighbours are rounded independently of each other.
    other = (words(drawn) != words(x) >> 16) - share
    correlation = np.corrcoef(other.T)[np.triu_indices(200, 1)]
    assert np.abs(correlation).max() < 6 / np.sqrt(draws)


def test_leaves_steps_and_seeds_draw_differently_and_again_the_same():
    params = {"a": jnp.zeros(500, jnp.bfloat16), "b": jnp.zeros(500, jnp.bfloat16)}
    grads = jax.tree.map(lambda x: jnp.full(x.shape, 1 + 2**-9), params)
    draw = lambda seed, steps: run(stochastic_rounding(optax.sgd(1e-3), seed), params, grads, steps)[0]
    chex.assert_trees_all_equal(draw(0, 1), draw(0, 1))
    one, two = draw(0, 1), draw(1, 1)
    twice = optax.tree.sub(draw(0, 2), one)
    for x, y in [(one["a"], one["b"]), (one["a"], two["a"]), (one["a"], twice["a"])]:
        assert 0.1 < np.mean(np.asarray(x != y)) < 0.9


def test_tiny_steps_add_up_where_the_nearest_rounding_stands_still():
    # 2^-11 is an eighth of the spacing below one: a quarter of what the nearest rounding would notice.
    count, steps, rate = 4096, 64, 2.0**-11
    params, grads = {"w": jnp.ones(count, jnp.bfloat16)}, {"w": jnp.ones(count)}
    nearest, _ = run(optax.sgd(rate), params, grads, steps)
    chex.assert_trees_all_equal(nearest, params)
    moved, _ = run(stochastic_rounding(optax.sgd(rate)), params, grads, steps)
    # Each step is down by 2^-8 with probability 1/8, else not at all.
    spread = 2.0**-8 * np.sqrt(steps * 0.125 * 0.875 / count)
    assert abs(exact(moved["w"]).mean() - (1 - steps * rate)) < 4 * spread
    copied, _ = run(master_weights(optax.sgd(rate)), params, grads, steps)
    assert np.all(exact(copied["w"]) == 1 - steps * rate)


def test_parameters_are_the_rounded_master_bit_for_bit():
    # From any number to any other, through a jitted update and an addition of its own: first of any size, then of
    # like sizes, then nearly to zero from just below a power of two, which the parameter has been rounded up to.
    count = 100_000
    near = words(random_floats(count, 3, 1, 254)) & 0xFF800000 | 0x7FC000 + np.arange(count) % 0x4000
    master = jnp.concatenate([random_floats(count, 2), random_floats(count, 4, 120, 130), floats(near)])
    falls = -floats(near + np.arange(count) % 7 - 3)
    new = jnp.concatenate([random_floats(count, 5), random_floats(count, 6, 120, 130)])
    grads = jnp.concatenate([new - master[: 2 * count], falls])
    old, state = master.astype(jnp.bfloat16), MasterState(master, optax.EmptyState())
    updates, state = jax.jit(master_weights(optax.identity()).update)(grads, state, old)
    reached = optax.apply_updates(old, updates)
    assert np.array_equal(words(reached), words(state.master.astype(jnp.bfloat16)))

    before, wanted, after = (exact(x) for x in (old, master + grads, state.master))
    missed = wanted != after
    assert not missed[count : 2 * count].any()
    assert missed[2 * count :].any()
    # Only a fall by more than 2^15 in one step is missed, by less than float32 resolves at its start.
    before, wanted, after = (x[missed & (np.abs(before) < 1e38)] for x in (before, wanted, after))
    assert np.all(np.abs(wanted) <= 2.0**-15 * np.abs(before))
    assert np.all(np.abs(after - wanted) <= 2.0**-24 * np.abs(before))


@BOTH
def test_the_longest_leap_stays_finite(wrap):
    # The largest bfloat16 less the largest float32 rounds to -2^120, which is 2^128 away: beyond float32.
    old = floats([LARGEST, LARGEST | 1 << 31]).astype(jnp.bfloat16)
    moved, state = run(wrap(optax.identity()), old, floats([0xFF7FFFFF, 0x7F7FFFFF]))
    assert exact(moved).tolist() == [-(2.0**120), 2.0**120]
    chex.assert_tree_all_finite(state)


def losses(params):
    batch = random_batch()
    return next_token(LM)(params, batch, jax.random.key(0)).losses["next_token"].sum


def test_the_master_runs_as_float32_with_gradients_at_the_rounded_parameters():
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
    gradient = jax.jit(jax.grad(losses))
    params = cast_parameters(lively(LM.init(jax.random.key(0))), "bfloat16_master")
    tx = master_weights(inner)
    state = tx.init(params)
    plain = optax.tree.cast(params, jnp.float32)
    plain_state = inner.init(plain)
    for _ in range(4):
        updates, state = tx.update(gradient(params), state, params)
        params = optax.apply_updates(params, updates)
        grads = optax.tree.cast(gradient(optax.tree.cast(plain, jnp.bfloat16)), jnp.float32)
        updates, plain_state = inner.update(grads, plain_state, plain)
        plain = optax.apply_updates(plain, updates)
        chex.assert_trees_all_equal(state.master, plain)
        chex.assert_trees_all_equal(state.inner, plain_state)
        chex.assert_trees_all_equal(params, optax.tree.cast(plain, jnp.bfloat16))


@pytest.mark.parametrize(
    ("parameters", "size"), [("float32", 12), ("bfloat16_master", 14), ("bfloat16_stochastic", 10)]
)
def test_bytes_per_parameter(parameters, size):
    def state(key):
        params = cast_parameters(LM.init(key), parameters)
        return params, build_optimizer(OptimConfig(parameters=parameters), LM.axes, 10).init(params)

    params, opt_state = jax.eval_shape(state, jax.random.key(0))
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    counters = [leaf for leaf in jax.tree.leaves(opt_state) if not leaf.shape]
    assert len(counters) <= 3
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((params, opt_state)) if leaf.shape)
    assert held == size * count


@BOTH
def test_any_mesh_gives_the_same_and_state_is_found_by_path(wrap):
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    specs = {"w": PartitionSpec("a", "b"), "deep": {"w": PartitionSpec(None, ("b", "a"))}}
    shapes = {"w": (4, 8), "deep": {"w": (3, 16)}}
    is_shape = lambda leaf: isinstance(leaf, tuple)
    params = jax.tree.map(lambda shape: jnp.ones(shape, jnp.bfloat16), shapes, is_leaf=is_shape)
    grads = lively(jax.tree.map(jnp.zeros_like, params))
    tx = wrap(optax.adam(1e-3))
    by_path = {path_name(path): spec for path, spec in jax.tree_util.tree_leaves_with_path(specs)}

    def spec_of(path, leaf):
        name = path_name(path)
        found = [suffix for suffix in by_path if f"/{name}".endswith(f"/{suffix}")]
        assert bool(found) == bool(leaf.shape), name
        return NamedSharding(mesh, by_path[max(found, key=len)] if found else PartitionSpec())

    def steps(params, state):
        for _ in range(3):
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    start = (params, tx.init(params))
    placed = jax.tree_util.tree_map_with_path(spec_of, start)
    sharded = jax.jit(steps, in_shardings=placed, out_shardings=placed)(*jax.device_put(start, placed))
    assert sharded[0]["w"].sharding.spec == specs["w"]
    chex.assert_trees_all_equal(sharded, jax.jit(steps)(*start))


@BOTH
def test_masked_leaves_and_none_are_skipped_and_change_no_draw(wrap):
    params = {"a": jnp.ones(300, jnp.bfloat16), "b": jnp.ones(300, jnp.bfloat16), "none": None}
    grads = jax.tree.map(lambda x: jnp.full(x.shape, 1.0), params)
    tx = wrap(optax.adam(1e-3))
    full, state = run(tx, params, grads)
    assert full["none"] is None
    chex.assert_trees_all_equal_structs(state, tx.init(params))
    masked = optax.masked(tx, {"a": True, "b": False, "none": True})
    part, _ = run(masked, params, grads)
    chex.assert_trees_all_equal(part["a"], full["a"])
    assert bool(jnp.all(part["b"] == 2))  # masked leaves keep their gradient for an update


@BOTH
def test_injected_hyperparameters_and_extra_arguments_reach_the_inner_chain(wrap):
    def scale_by_argument() -> optax.GradientTransformationExtraArgs:
        update = lambda grads, state, params=None, *, factor: (jax.tree.map(lambda g: factor * g, grads), state)
        return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)

    tx = wrap(optax.chain(optax.inject_hyperparams(optax.sgd)(0.5), scale_by_argument()))
    params = {"w": jnp.ones(4, jnp.bfloat16)}
    state = tx.init(params)
    state.inner[0].hyperparams["learning_rate"] = jnp.asarray(0.25)
    updates, _ = jax.jit(tx.update)({"w": jnp.ones(4)}, state, params, factor=2.0)
    assert np.all(exact(updates["w"]) == -0.5)
    outside = optax.inject_hyperparams(wrap)(inner=optax.sgd(0.5))
    moved, _ = run(outside, params, {"w": jnp.ones(4)})
    assert np.all(exact(moved["w"]) == 0.5)


def test_an_injected_seed_draws_what_the_number_draws():
    params, grads = {"w": jnp.ones(300, jnp.bfloat16)}, {"w": jnp.ones(300)}
    injected = optax.inject_hyperparams(stochastic_rounding)(optax.sgd(1e-3), seed=7)
    chex.assert_trees_all_equal(
        run(injected, params, grads, 2)[0], run(stochastic_rounding(optax.sgd(1e-3), 7), params, grads, 2)[0]
    )


@BOTH
def test_accumulated_by_multi_steps(wrap):
    params, grads = {"w": jnp.ones(8, jnp.bfloat16)}, {"w": jnp.ones(8)}
    tx = optax.MultiSteps(wrap(optax.sgd(0.5)), 2)
    update = jax.jit(tx.update)
    state = tx.init(params)
    seen = []
    for _ in range(4):
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(float(params["w"][0]))
    assert seen == [1, 0.5, 0.5, 0]


@BOTH
def test_parameters_of_another_type_or_none_are_refused(wrap):
    with pytest.raises(UserError, match=r"parameter a/w = 'float32': expected bfloat16"):
        wrap(optax.sgd(1.0)).init({"a": {"w": jnp.ones(2)}})
    params = {"w": jnp.ones(2, jnp.bfloat16)}
    tx = wrap(optax.sgd(1.0))
    with pytest.raises(UserError, match=r"params = None"):
        tx.update(params, tx.init(params))
