"""The step on meshes of eight devices: the same numbers as on one, everything where it belongs, nothing gathered."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding, PartitionSpec
from meshes import BATCHES, INVOLUNTARY, LM, MESHES, MIXED, STEPS, TX, placed, small_lm, trained

from lmlab.models.config import ExecutionConfig
from lmlab.optim.chain import build_optimizer
from lmlab.optim.config import OptimConfig, ScheduleConfig
from lmlab.testing.tables import OBJECTIVES
from lmlab.testing.tiny import lively
from lmlab.train import parallel
from lmlab.train.config import ParallelConfig
from lmlab.train.state import init_state
from lmlab.train.step import total_loss


@pytest.fixture(scope="module", params=OBJECTIVES)
def case(request):
    case = OBJECTIVES[request.param]
    objective, lm, batches = case.build(LM), case.model(LM), [case.batch(rows=8, seed=seed) for seed in range(STEPS)]
    return objective, lm, batches, trained(objective, lm=lm, batches=batches)


@pytest.mark.parametrize("sizes", MIXED, ids=str)
def test_a_mesh_gives_the_numbers_of_one_device(case, sizes):
    objective, lm, batches, alone = case
    chex.assert_trees_all_close(trained(objective, sizes, lm=lm, batches=batches), alone, atol=1e-5, rtol=1e-5)


def test_every_mesh_gives_the_numbers_of_one_device():
    objective = OBJECTIVES["next_token_z_loss"].build(LM)
    alone = trained(objective)
    for sizes in set(MESHES) - set(MIXED):
        chex.assert_trees_all_close(trained(objective, sizes), alone, atol=1e-5, rtol=1e-5)


@pytest.fixture
def compiled_anew(tmp_path):
    """A compile cache of its own, so that the compiler has something to say."""
    before = jax.config.values["jax_compilation_cache_dir"]
    for folder in (str(tmp_path / "xla"), before):
        jax.config.update("jax_compilation_cache_dir", folder)
        compilation_cache.reset_cache()
        if folder != before:
            yield


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_the_compiler_gathers_nothing_to_change_its_place(sizes, compiled_anew, capfd):
    trained(OBJECTIVES["next_token_z_loss"].build(LM), sizes, batches=BATCHES[:1])
    assert INVOLUNTARY not in capfd.readouterr().err


def test_the_compiler_would_say_so(compiled_anew, capfd):
    """A change of place that it cannot make without gathering."""
    mesh = parallel.make_mesh(ParallelConfig(2, 2, 1, 2))
    put = lambda x, *axes: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*axes)))
    moved = lambda x: put(put(x, "data", None).reshape(16, 8, 8), None, None, ("tensor", "data"))
    jax.jit(moved).lower(jnp.ones((64, 16))).compile()
    assert INVOLUNTARY in capfd.readouterr().err


def test_pmap_gives_the_numbers_of_one_device(case):
    objective, lm, batches, alone = case
    step = parallel.pmapped_step(objective, TX)
    state = parallel.replicate(init_state(lm.init, TX, 0), 8)
    for batch in batches:
        state, metrics = step(state, parallel.deal_rows(batch, 8))
    for replica in (0, 7):
        mine = jax.device_get(jax.tree.map(lambda x, i=replica: x[i], (state.params, metrics)))
        chex.assert_trees_all_close(mine, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sizes", [(2, 1, 1, 1), (1, 2, 1, 2)], ids=str)
def test_microbatches_on_a_mesh(sizes):
    objective = OBJECTIVES["next_token"].build(LM)
    few = BATCHES[:3]
    chex.assert_trees_all_close(
        trained(objective, sizes, batches=few, microbatches=4), trained(objective, batches=few), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"window": 3},
        {"positions": "learned", "norm": "layer", "tied": False},
        {"execution": ExecutionConfig(remat="full", unroll=0)},
        {"execution": ExecutionConfig(remat="dots")},
    ],
    ids=str,
)
def test_other_models_on_a_mesh_of_all_axes(changes):
    lm = small_lm(**changes)
    objective = OBJECTIVES["next_token"].build(lm)
    one, other = (trained(objective, sizes, lm, batches=BATCHES[:3]) for sizes in (None, (1, 2, 2, 2)))
    chex.assert_trees_all_close(other, one, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rule", ["adamw", "adafactor", "muon", "lion"])
def test_every_rule_on_a_mesh(rule):
    config = OptimConfig(rule=rule, eps=1e-3, schedule=ScheduleConfig(peak=1e-3, warmup=0))
    tx = build_optimizer(config, LM.axes, 20)
    objective = OBJECTIVES["next_token"].build(LM)
    few = BATCHES[:2]
    one, other = (trained(objective, sizes, tx=tx, batches=few) for sizes in (None, (2, 2, 1, 2)))
    # Lion steps by signs, and the sign of a gradient that is zero but for rounding is anything.
    share = np.mean(
        [np.abs(a - b).max() < 1e-4 for a, b in zip(*map(jax.tree.leaves, (one[0], other[0])), strict=True)]
    )
    assert share == 1 or (rule == "lion" and share > 0.5)


def test_gradients_meet_in_float32_under_bfloat16_compute():
    lm = small_lm(execution=ExecutionConfig(compute_dtype="bfloat16"))
    mesh = parallel.make_mesh(ParallelConfig(2, 2, 1, 2))
    with jax.set_mesh(mesh):
        step, state = placed(lm, TX, mesh, OBJECTIVES["next_token"].build(lm))
        text = step.lower(state, parallel.place_batch(BATCHES[0], mesh)).as_text()
    # Products that form the gradient of a kernel contract over rows and places; all of them give float32.
    contracted = "contracting_dims = [0, 1] x [0, 1]"
    results = [line.split("-> tensor<")[1].split(">")[0] for line in text.splitlines() if contracted in line]
    assert len(results) >= 5
    assert all(result.endswith("xf32") for result in results)


def test_a_step_in_bfloat16_runs_on_a_mesh():
    lm = small_lm(execution=ExecutionConfig(compute_dtype="bfloat16"))
    objective = OBJECTIVES["next_token"].build(lm)
    one, other = (trained(objective, sizes, lm, batches=BATCHES[:2])[1] for sizes in (None, (1, 2, 2, 2)))
    assert other["loss"] == pytest.approx(one["loss"], rel=1e-3)
    assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-2)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (1, 2, 2, 2)], ids=str)
def test_the_gradient_has_a_gradient_both_ways(sizes):
    """Hessian-vector products, forwards over the gradient and backwards, are the same."""
    objective = OBJECTIVES["next_token_z_loss"].build(LM)
    params = lively(LM.init(jax.random.key(0)))
    vector = lively(jax.tree.map(jnp.zeros_like, params), seed=1)
    loss = lambda params: total_loss(objective(params, BATCHES[0], jax.random.key(0)), {"next_token": jnp.ones(())})
    inner = lambda params: sum(map(jnp.vdot, jax.tree.leaves(jax.grad(loss)(params)), jax.tree.leaves(vector)))
    with jax.set_mesh(parallel.make_mesh(ParallelConfig(*sizes))):
        forwards = jax.jit(lambda p, v: jax.jvp(jax.grad(loss), (p,), (v,))[1])(params, vector)
        backwards = jax.jit(jax.grad(inner))(params)
    for one, other in zip(jax.tree.leaves(forwards), jax.tree.leaves(backwards), strict=True):
        scale = float(jnp.abs(one).max())
        chex.assert_trees_all_close(jax.device_get(one) / scale, jax.device_get(other) / scale, atol=1e-4)
