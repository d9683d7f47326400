"""Schedules by their corners, decay by path, Muon's matrices, clipping."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmlab.core.errors import UserError
from lmlab.optim.chain import build_optimizer, build_schedule
from lmlab.optim.config import GaloreConfig, OptimConfig, ScheduleConfig
from lmlab.optim.galore import scale_by_galore
from lmlab.optim.groups import MatrixAxes, matrix_axes
from lmlab.optim.matrices import by_axes
from lmlab.optim.moments import subspace_adam
from lmlab.optim.timing import together
from lmlab.testing.tiny import lively, tiny_lm

LM = tiny_lm(norm="layer", tied=False)
PARAMS = lively(LM.init(jax.random.key(0)))
ZEROS = jax.tree.map(jnp.zeros_like, PARAMS)


def rates(decay: str, **kwargs: float) -> np.ndarray:
    schedule = build_schedule(ScheduleConfig(peak=1.0, warmup=10, end=0.1, decay=decay, **kwargs), 100)
    return np.asarray([schedule(step) for step in range(101)])


@pytest.mark.parametrize("decay", ["cosine", "linear", "wsd", "constant"])
def test_warmup_is_linear_and_reaches_the_peak(decay):
    assert np.allclose(rates(decay)[:10], np.arange(1, 11) / 10)


def test_decays_end_where_they_should():
    assert np.isclose(rates("cosine")[100], 0.1)
    assert np.isclose(rates("cosine")[55], 0.55, atol=1e-3)
    assert np.isclose(rates("linear")[55], 0.55)
    assert np.allclose(rates("constant")[10:], 1)


def test_wsd_is_constant_then_falls():
    values = rates("wsd", cooldown=0.2)
    assert np.allclose(values[10:81], 1)
    assert np.isclose(values[90], 0.55)
    assert np.isclose(values[100], 0.1)


def test_phases_longer_than_the_run_are_refused():
    with pytest.raises(UserError, match=r"optim.schedule.warmup = 200"):
        build_schedule(ScheduleConfig(warmup=200), 100)


@pytest.mark.parametrize("rule", ["adamw", "lion", "adafactor", "muon", "sgd"])
def test_decay_is_decoupled_and_spares_norms_and_biases(rule):
    config = OptimConfig(rule=rule, weight_decay=0.5, schedule=ScheduleConfig(peak=0.1, warmup=0, decay="constant"))
    tx = build_optimizer(config, LM.axes, 10)
    updates, _ = tx.update(ZEROS, tx.init(PARAMS), PARAMS)

    def expected(path, param):
        spared = any(word in jax.tree_util.keystr(path) for word in ("norm", "bias"))
        return jnp.zeros_like(param) if spared else -0.05 * param

    chex.assert_trees_all_close(updates, jax.tree_util.tree_map_with_path(expected, PARAMS), atol=1e-6)


def test_clipping_is_by_the_global_norm():
    config = OptimConfig(rule="sgd", b1=0, weight_decay=0, clip=1.0, schedule=ScheduleConfig(1.0, 0, "constant"))
    tx = build_optimizer(config, LM.axes, 10)
    grads = jax.tree.map(lambda x: 100 * jnp.ones_like(x), PARAMS)
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
    assert np.isclose(optax.tree.norm(updates), 1, rtol=1e-5)


def test_matrix_axes_see_through_stacks_and_heads():
    assert matrix_axes(("layers", "embed", "heads", "head_dim")) == MatrixAxes((0,), (1,), (2, 3))
    assert matrix_axes(("layers", "heads", "head_dim", "embed")) == MatrixAxes((0,), (1, 2), (3,))
    assert matrix_axes(("layers", "embed", "stack", "ffn")) == MatrixAxes((0, 2), (1,), (3,))
    for names in [
        ("layers", "norm"),
        ("vocab", "embed"),
        ("positions", "embed"),
        ("layers", "stack", "kv_heads", "head_dim"),
    ]:
        assert matrix_axes(names) is None


def test_muon_orthogonalises_each_matrix_of_a_stack():
    config = OptimConfig(rule="muon", b1=0, b2=0, weight_decay=0, clip=0, schedule=ScheduleConfig(1.0, 0, "constant"))
    tx = build_optimizer(config, LM.axes, 10)
    grads = lively(ZEROS, seed=2)
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
    gate_up = updates["layers"]["mlp"]["gate_up"]["kernel"]  # [L, D, 2, F]
    for layer in range(2):
        for half in range(2):
            singular = jnp.linalg.svd(gate_up[layer, :, half], compute_uv=False)
            # Newton-Schulz brings all singular values near one common value.
            assert singular.max() / singular.min() < 2.5
    mixed = jnp.linalg.svd(grads["layers"]["mlp"]["gate_up"]["kernel"][0, :, 0], compute_uv=False)
    assert mixed.max() / mixed.min() > 2.5


def test_a_projected_rule_stands_where_the_rule_stood():
    config = OptimConfig(b2=0.9, galore=GaloreConfig(rank=3, refresh_every=2, include=("mlp",)),
                         schedule=ScheduleConfig(0.1, 0, "constant"))  # fmt: skip
    tx = build_optimizer(config, LM.axes, 10)
    choice = by_axes(LM.axes, ("mlp",))
    spared = jax.tree_util.tree_map_with_path(lambda path, _: not any(w in str(path) for w in ("norm", "bias")), PARAMS)
    by_hand = optax.chain(
        optax.clip_by_global_norm(1.0), scale_by_galore(choice, 3, inner=subspace_adam(b2=0.9), timing=together(2)),
        optax.add_decayed_weights(0.1, spared), optax.scale_by_learning_rate(0.1),
    )  # fmt: skip
    states, grads = [tx.init(PARAMS), by_hand.init(PARAMS)], lively(ZEROS, seed=2)
    for _ in range(3):
        (one, states[0]), (two, states[1]) = (
            jax.jit(each.update)(grads, state, PARAMS) for each, state in zip((tx, by_hand), states, strict=True)
        )
        chex.assert_trees_all_close(one, two, atol=1e-6)
    held = states[0][1]
    assert jax.tree.leaves(held.left["layers"]["attention"]) == jax.tree.leaves(held.left["embedding"]) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"galore": {"rank": -1}}, "optim.galore.rank"),
        ({"galore": {"rank": 4}, "rule": "muon"}, "optim.galore.rank"),
        ({"galore": {"rank": 4, "moments": "rotate"}, "rule": "lion"}, "optim.galore.moments"),
        ({"galore": {"rank": 4, "projectors": "drawn"}}, "optim.galore.projectors"),
        ({"galore": {"rank": 4, "side": "two_sided", "update": "fira"}}, "optim.galore.side"),
        ({"galore": {"rank": 4, "refresh_every": 0}}, "optim.galore.refresh_every"),
        ({"galore": {"rank": 2.5}}, "optim.galore.rank"),
        ({"galore": {"update": "fira"}}, "optim.galore.rank = 0: expected a rank, since update is set"),
        ({"galore": {"rank": 4, "refresh": "gaussian", "moments": "rotate"}}, "optim.galore.refresh"),
        ({"galore": {"rank": 4, "refresh": "gaussian", "update": "fira"}}, "optim.galore.refresh"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(changes, said):
    with pytest.raises(UserError, match=said):
        OptimConfig(**{**changes, "galore": GaloreConfig(**changes["galore"])})
