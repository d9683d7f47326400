"""GaLore by its laws: what a projected update is, when subspaces change, what is left alone."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from steps import gradients

from lmlab.core.errors import UserError
from lmlab.optim.galore import galore, scale_by_galore
from lmlab.optim.groups import MatrixAxes
from lmlab.optim.matrices import by_axes, by_path, to_matrices
from lmlab.optim.moments import KEEP, RESET, ROTATE, subspace_adam, with_shapes_of_updates
from lmlab.optim.quantised import INT4
from lmlab.optim.residual import plain
from lmlab.optim.subspace import exact_svd, gaussian, gram
from lmlab.optim.timing import lazy, staggered, together

FLAT = MatrixAxes((), (0,), (1,))
SIDES = ("std", "reverse_std", "left", "right", "two_sided")
SHAPES = ((6, 10), (10, 6), (8, 8))


def run(tx, grads, jit=True):
    """Updates at every step, and the last state. grads: a tree with a first axis of steps."""
    state = tx.init(jax.tree.map(lambda x: x[0], grads))
    update = jax.jit(tx.update) if jit else tx.update
    out = []
    for step in range(len(jax.tree.leaves(grads)[0])):
        updates, state = update(jax.tree.map(lambda x, i=step: x[i], grads), state)
        out.append(updates)
    return out, state


def scaled(**options):
    options = {"rank": 2, "refresh": exact_svd, **options}
    return scale_by_galore(by_path(), **options)


def projecting(**options):
    """The projection alone."""
    return scaled(inner=optax.identity(), lift=plain(1.0), **options)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("rank", [2, 100, 0.5])
def test_shapes_follow_the_table(shape, side, rank):
    (m, n), short = shape, min(shape)
    r = {2: 2, 100: short, 0.5: short // 2}[rank]
    left = {"std": m <= n, "reverse_std": m > n, "left": True, "right": False, "two_sided": True}[side]
    right = side == "two_sided" or not left
    state = scaled(rank=rank, side=side).init({"w": jnp.zeros(shape)})
    assert (state.left["w"].shape if left else None) == ((m, r) if left else None)
    assert (state.right["w"].shape if right else None) == ((r, n) if right else None)
    assert state.inner.mu["w"].shape == state.inner.nu["w"].shape == (r if left else m, r if right else n)
    floats = sum(x.size for x in jax.tree.leaves(state) if x.dtype == jnp.float32)
    assert (
        floats
        == {
            "std": r * min(m, n) + 2 * r * max(m, n),
            "reverse_std": r * max(m, n) + 2 * r * min(m, n),
            "left": r * m + 2 * r * n,
            "right": r * n + 2 * r * m,
            "two_sided": r * (m + n) + 2 * r * r,
        }[side]
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("side", SIDES)
def test_at_a_refresh_the_update_is_the_truncated_svd(shape, side):
    G = gradients(*shape, steps=1)[0]
    U, s, Vh = np.linalg.svd(G, full_matrices=False)
    ((update,), _) = run(projecting(side=side), {"w": G[None]})
    assert np.allclose(update["w"], (U[:, :2] * s[:2]) @ Vh[:2], atol=1e-5)
    # Eckart and Young: no matrix of this rank is nearer.
    assert np.isclose(jnp.sum((G - update["w"]) ** 2), np.sum(s[2:] ** 2), rtol=1e-5)
    ((whole,), _) = run(projecting(side=side, rank=6 if min(shape) == 6 else 8), {"w": G[None]})
    assert np.allclose(whole["w"], G, atol=1e-5)


def test_projecting_twice_is_projecting_once():
    tx = projecting(timing=together(100))
    state = tx.init({"w": jnp.zeros((6, 10))})
    for G in gradients(6, 10, steps=3):
        once, state = tx.update({"w": G}, state)
        twice, _ = tx.update(once, state)
    chex.assert_trees_all_close(once, twice, atol=1e-5)
    assert not np.allclose(once["w"], G, atol=0.1)


@pytest.mark.parametrize("when", [together(3), lazy(3, threshold=2.0)], ids=["together", "lazy"])
def test_the_basis_is_orthonormal_and_changes_at_multiples_of_the_period_alone(when):
    tx = scaled(timing=when)
    state = tx.init({"w": jnp.zeros((6, 10))})
    changed = []
    for step, G in enumerate(gradients(6, 10, steps=8)):
        before = state.left["w"]
        _, state = jax.jit(tx.update)({"w": G}, state)
        P = state.left["w"]
        assert np.allclose(P.T @ P, np.eye(2), atol=1e-5)
        if not bool(jnp.all(before == P)):
            changed.append(step)
    assert changed == [0, 3, 6]


def test_staggered_refreshes_come_one_by_one():
    tx = scale_by_galore(lambda path, shape: MatrixAxes((0,), (1,), (2,)), 2, timing=staggered(8))
    params = {"a": jnp.zeros((3, 6, 10)), "b": jnp.zeros((1, 10, 6))}
    state, seen = tx.init(params), []
    draw = lambda step: jax.tree.map(lambda x: jax.random.normal(jax.random.key(step), x.shape), params)
    for step in range(17):
        before = state.left["a"], state.right["b"]
        _, state = jax.jit(tx.update)(draw(step), state)
        after = state.left["a"], state.right["b"]
        moved = [np.any(np.asarray(old != new), axis=(1, 2)) for old, new in zip(before, after, strict=True)]
        seen.append(np.flatnonzero(np.concatenate(moved)).tolist())
    # At first all; from then on number l of 4 at 2 l, 2 l + 8, ...
    expected = [[0, 1, 2, 3]] + [[step % 8 // 2] if step % 2 == 0 else [] for step in range(1, 17)]
    assert seen == expected


def test_transposed_gradients_give_transposed_updates():
    G = gradients(6, 10)
    straight, _ = run(scaled(timing=together(3)), {"w": G})
    turned, _ = run(scaled(timing=together(3)), {"w": G.swapaxes(1, 2)})
    for a, b in zip(straight, turned, strict=True):
        assert np.allclose(a["w"].T, b["w"], atol=1e-5)


@pytest.mark.parametrize("side", SIDES)
def test_with_momentum_it_does_not_matter_how_space_is_turned(side):
    tx = scaled(inner=optax.trace(0.9), side=side, timing=together(100))
    A, B = (jnp.linalg.qr(gradients(k, k, steps=1, seed=k)[0])[0] for k in (6, 10))
    G = gradients(6, 10)
    straight, _ = run(tx, {"w": G})
    turned, _ = run(tx, {"w": A @ G @ B})
    for a, b in zip(straight, turned, strict=True):
        assert np.allclose(A @ a["w"] @ B, b["w"], atol=1e-5)


def test_the_full_rank_is_the_inner_transform_if_that_can_be_turned():
    """Momentum can, Adam cannot."""
    G = {"w": gradients(6, 10)}
    for inner, same in ((optax.trace(0.9), True), (optax.scale_by_adam(), False)):
        ours, _ = run(scaled(rank=6, inner=inner, lift=plain(1.0), timing=together(100)), G)
        theirs, _ = run(inner, G)
        assert np.allclose(ours[-1]["w"], theirs[-1]["w"], atol=1e-4) == same


def test_the_scale_only_scales():
    G = {"w": gradients(6, 10), "bias": gradients(10)}
    one, state = run(scaled(lift=plain(0.25)), G)
    two, other = run(scaled(lift=plain(0.5)), G)
    chex.assert_trees_all_equal(state, other)
    for a, b in zip(one, two, strict=True):
        chex.assert_trees_all_equal(2 * a["w"], b["w"])
        chex.assert_trees_all_equal(a["bias"], b["bias"])


def test_what_is_not_chosen_is_adam_to_the_bit():
    G = {"mlp": gradients(6, 10), "embedding": gradients(7, 4), "bias": gradients(10)}
    tx = scale_by_galore(by_path("mlp"), 2, inner=subspace_adam(policy=ROTATE), timing=together(2))
    # Not compiled: the compiler may contract a product and a sum in one of two programs.
    ours, _ = run(tx, G, jit=False)
    theirs, _ = run(optax.scale_by_adam(), G, jit=False)
    for a, b in zip(ours, theirs, strict=True):
        chex.assert_trees_all_equal((a["embedding"], a["bias"]), (b["embedding"], b["bias"]))
        assert not np.allclose(a["mlp"], b["mlp"], atol=1e-2)


def flipping(refresh):
    """The same subspaces, their columns with signs as chance has it."""

    def flipped(G, old, key):
        signs = jnp.where(jax.random.bernoulli(key, 0.5, (old.shape[1],)), 1.0, -1.0)
        return refresh(G, old, key) * signs[None]

    return flipped


@pytest.mark.parametrize("policy", [KEEP, ROTATE, RESET], ids=["keep", "rotate", "reset"])
def test_signs_of_singular_vectors_change_nothing(policy):
    G = {"w": gradients(10, 6, steps=9)}
    build = lambda refresh: scaled(refresh=refresh, inner=subspace_adam(policy=policy), timing=together(3))
    straight, _ = run(build(gram), G)
    flipped, _ = run(build(flipping(gram)), G)
    for a, b in zip(straight, flipped, strict=True):
        chex.assert_trees_all_equal(a, b)


def each_alone(x):
    return {str(i): x[:, i] for i in range(x.shape[1])}


@pytest.mark.parametrize(
    ("when", "policy"), [(together(3), ROTATE), (staggered(6), ROTATE), (staggered(6), RESET)], ids=range(3)
)
def test_a_stack_is_its_matrices(when, policy):
    G = gradients(3, 6, 10)
    options = {"inner": subspace_adam(policy=policy), "refresh": gram, "timing": when}
    stacked, _ = run(scale_by_galore(lambda *_: MatrixAxes((0,), (1,), (2,)), 2, **options), {"w": G})
    apart, _ = run(scale_by_galore(by_path(), 2, **options), each_alone(G))
    for a, b in zip(stacked, apart, strict=True):
        for i in range(3):
            assert np.allclose(a["w"][i], b[str(i)], atol=1e-6)


@pytest.mark.parametrize("side", ["std", "two_sided"])
@pytest.mark.parametrize(
    "names",
    [("layers", "embed", "heads", "head_dim"), ("heads", "layers", "head_dim", "embed"), ("embed", "stack", "ffn")],
    ids="-".join,
)
def test_axes_of_heads_and_stacks_are_seen_through(names, side):
    sizes = {"layers": 2, "embed": 6, "heads": 2, "head_dim": 4, "stack": 2, "ffn": 5}
    shape = tuple(sizes[name] for name in names)
    choice = by_axes({"w": names})
    G = gradients(*shape)
    tx = lambda choice: scale_by_galore(choice, 2, side=side, refresh=exact_svd, timing=together(3))
    seen, state = run(tx(choice), {"w": G})
    axes = choice("w", shape)
    matrices = jnp.stack([to_matrices(x, axes) for x in G])
    plainly, _ = run(tx(lambda *_: MatrixAxes((0,), (1,), (2,))), {"w": matrices})
    assert {x.ndim for x in jax.tree.leaves((state.left, state.right, state.inner.mu))} == {len(shape)}
    for a, b in zip(seen, plainly, strict=True):
        assert np.allclose(to_matrices(a["w"], axes), b["w"], atol=1e-6)


def test_wrong_input_is_told_of():
    with pytest.raises(UserError, match="embedding"):
        scale_by_galore(by_path("mlp"), 2).init({"embedding": jnp.zeros((3, 4))})
    with pytest.raises(UserError, match="rank = 0"):
        scaled(rank=0)
    tx = scaled(inner=optax.adamw(1e-3))
    with pytest.raises(UserError, match="weight decay"):
        tx.update({"w": jnp.ones((3, 4))}, tx.init({"w": jnp.ones((3, 4))}))
    with pytest.raises(UserError, match="store"):
        scaled(store=None, timing=staggered(3), refresh=gaussian)
    with pytest.raises(UserError, match="needs no gradient"):
        scaled(store=None)
    with pytest.raises(UserError, match="side = 'rows'"):
        scaled(side="rows")
    with pytest.raises(UserError, match=r"rank = 2\.7"):
        scaled(rank=2.7)
    for timing in (together, staggered, lazy):
        with pytest.raises(UserError, match="every = 0"):
            timing(0)
    gate = scale_by_galore(by_axes({"w": ("layers", "embed", "stack", "ffn")}), 1, store=INT4)
    with pytest.raises(UserError, match="rank = 1"):
        gate.init({"w": jnp.zeros((2, 6, 2, 8))})


def test_a_transform_that_only_looks_at_shapes_can_be_projected():
    G = {"w": gradients(160, 200)}
    with pytest.raises(UserError, match="with_shapes_of_updates"):
        run(scaled(rank=140, inner=optax.scale_by_factored_rms()), G)
    inner = with_shapes_of_updates(optax.scale_by_factored_rms())
    updates, state = run(scaled(rank=140, inner=inner), G)
    assert state.inner.v_row["w"].shape == (140,)
    assert all(np.isfinite(update["w"]).all() for update in updates)


def test_a_gradient_that_says_nothing_teaches_lazy_timing_nothing():
    tx = scaled(timing=lazy(1, threshold=0.0, window=2))
    G = {"w": jnp.zeros((6, 6, 10))}
    _, state = run(tx, G)
    assert state.timing["w"].every.tolist() == [1]
    _, state = run(tx, {"w": jnp.ones((6, 6, 10)) * gradients(6, 10, steps=1)})
    assert state.timing["w"].every.tolist() == [4]


def test_decay_is_of_the_full_parameter_and_not_scaled():
    params = {"w": gradients(6, 10, steps=1)[0]}
    tx = galore(0.1, by_path(), 2, weight_decay=0.5)
    updates, _ = tx.update({"w": jnp.zeros((6, 10))}, tx.init(params), params)
    chex.assert_trees_all_close(updates["w"], -0.05 * params["w"], rtol=1e-6)
