"""The step on meshes of eight devices: the same numbers as on one, everything where it belongs, nothing gathered."""

from collections import namedtuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lmlab.core.errors import UserError
from lmlab.models.config import AttentionConfig, ExecutionConfig, MLPConfig
from lmlab.optim.chain import build_optimizer
from lmlab.optim.config import OptimConfig, ScheduleConfig
from lmlab.testing.tables import OBJECTIVES
from lmlab.testing.tiny import random_batch, tiny_lm
from lmlab.train import parallel
from lmlab.train.checkpoint import finish, open_checkpoints, restore, save
from lmlab.train.config import ParallelConfig
from lmlab.train.state import init_state
from lmlab.train.step import make_step

STEPS = 20
MESHES = [(8, 1, 1, 1), (1, 8, 1, 1), (1, 1, 8, 1), (2, 1, 1, 4), (2, 2, 1, 2), (1, 2, 2, 2)]
BATCHES = [random_batch(rows=8, seed=seed) for seed in range(STEPS)]
TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, eps=1e-3))
INVOLUNTARY = "Involuntary full rematerialization"


def small_lm(**changes):
    """Sizes that every mesh here divides."""
    sizes = {
        "vocab_size": 8, "attention": AttentionConfig(heads=8, kv_heads=4, window=changes.pop("window", 0)),
        "mlp": MLPConfig(width=24),
    }  # fmt: skip
    return tiny_lm(**(sizes | changes))


LM = small_lm()


def placed(lm, tx, mesh, objective=None, **options):
    """A step and a state on a mesh."""
    shapes = parallel.abstract_state(lm.init, tx)
    shardings = parallel.state_shardings(shapes, parallel.param_shardings(lm.axes, shapes.params, mesh))
    step = objective and parallel.placed_step(make_step(objective, tx, **options), shardings)
    return step, init_state(lm.init, tx, 0, shardings)


def trained(objective, sizes=None, lm=LM, tx=TX, batches=BATCHES, **options):
    """Parameters and last metrics after all batches, on one device or on a mesh."""
    if sizes is None:
        step, state = jax.jit(make_step(objective, tx, **options)), init_state(lm.init, tx, 0)
        for batch in batches:
            state, metrics = step(state, batch)
        return jax.device_get((state.params, metrics))
    mesh = parallel.make_mesh(ParallelConfig(*sizes))
    with jax.set_mesh(mesh):
        step, state = placed(lm, tx, mesh, objective, **options)
        for batch in batches:
            state, metrics = step(state, parallel.place_batch(batch, mesh))
    return jax.device_get((state.params, metrics))


@pytest.fixture(scope="module", params=OBJECTIVES)
def case(request):
    objective = OBJECTIVES[request.param].build(LM)
    return objective, trained(objective)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_a_mesh_gives_the_numbers_of_one_device(case, sizes):
    objective, alone = case
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
    """The plain look-up in a table that is divided both ways is what `look_up` is there to avoid."""
    mesh = parallel.make_mesh(ParallelConfig(2, 2, 1, 2))
    put = lambda x, *axes: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*axes)))
    rows = ("data", "fsdp")
    plain = lambda table, ids: put(jnp.take(put(table, "tensor", "fsdp"), put(ids, rows), axis=0), rows, None, None)
    jax.jit(plain).lower(jnp.ones((64, 32)), jnp.zeros((8, 4), int)).compile()
    assert INVOLUNTARY in capfd.readouterr().err


def test_pmap_gives_the_numbers_of_one_device(case):
    objective, alone = case
    step = parallel.pmapped_step(objective, TX)
    state = parallel.replicate(init_state(LM.init, TX, 0), 8)
    for batch in BATCHES:
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


def test_state_is_made_and_stays_where_it_is_stored():
    mesh = parallel.make_mesh(ParallelConfig(2, 2, 1, 2))
    with jax.set_mesh(mesh):
        step, state = placed(LM, TX, mesh, OBJECTIVES["next_token"].build(LM))
        before = jax.tree.map(lambda x: x.sharding, state)
        first = state
        state, metrics = step(state, parallel.place_batch(BATCHES[0], mesh))
    assert jax.tree.all(jax.tree.map(lambda x, y: x.sharding == y, state, before))
    kernel = state.params["layers"]["mlp"]["gate_up"]["kernel"]
    assert kernel.sharding.spec == PartitionSpec(None, "fsdp", None, "tensor")
    assert kernel.addressable_shards[0].data.size == kernel.size // 4
    moments = state.opt_state[1][0]
    for moment in (moments.mu, moments.nu):
        chex.assert_trees_all_equal(
            jax.tree.map(lambda x: str(x.sharding.spec), moment),
            jax.tree.map(lambda x: str(x.sharding.spec), state.params),
        )
    assert metrics["loss"].sharding.is_fully_replicated
    assert first.params["embedding"].is_deleted()
    whole = init_state(LM.init, TX, 0)
    with jax.set_mesh(mesh):
        again = placed(LM, TX, mesh)[1]
    chex.assert_trees_all_close(jax.device_get(again.params), jax.device_get(whole.params), atol=1e-7)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (ParallelConfig(fsdp=3), "divide the 8 devices"),
        (ParallelConfig(data=4, tensor=4), "at most 8 devices"),
    ],
)
def test_a_mesh_that_the_devices_cannot_make(config, said):
    with pytest.raises(UserError, match=said):
        parallel.make_mesh(config)


def test_a_dimension_that_does_not_divide_is_named():
    mesh = parallel.make_mesh(ParallelConfig(1, 1, 1, 8))
    shapes = jax.eval_shape(LM.init, jax.random.key(0))
    with pytest.raises(
        UserError, match=r"a divisor of 4, the dimension 'kv_heads' of layers/attention/key_value/kernel"
    ):
        parallel.placements(LM.axes, shapes, mesh)


def test_rows_that_cannot_be_dealt():
    mesh = parallel.make_mesh(ParallelConfig(4, 2))
    parallel.check_rows(mesh, 16, 2)
    with pytest.raises(UserError, match=r"data.batch_size = 12.* = 8"):
        parallel.check_rows(mesh, 12)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 4, 1, 1), (1, 4, 1, 2)], ids=str)
def test_a_checkpoint_of_eight_devices_on_other_meshes(sizes, tmp_path):
    shapes = parallel.abstract_state(LM.init, TX)
    states = []
    for these in ((1, 8, 1, 1), sizes):
        mesh = parallel.make_mesh(ParallelConfig(*these))
        shardings = parallel.state_shardings(shapes, parallel.param_shardings(LM.axes, shapes.params, mesh))
        checkpoints = open_checkpoints(tmp_path)
        if not states:
            states.append(init_state(LM.init, TX, 0, shardings).replace(step=jnp.asarray(7, jnp.int32)))
            save(checkpoints, states[0], {})
        else:
            states.append(restore(checkpoints, parallel.with_shardings(shapes, shardings)))
            assert jax.tree.all(jax.tree.map(lambda x, y: x.sharding == y, states[1], shardings))
        finish(checkpoints)
    one, other = (jax.tree.map(jax.random.key_data, s.key) for s in states)
    chex.assert_trees_all_equal(jax.device_get(one), jax.device_get(other))
    one, other = (jax.device_get(s.replace(key=0)) for s in states)
    chex.assert_trees_all_equal(one, other)


def test_moments_wait_on_the_host_and_change_nothing(tmp_path):
    mesh = parallel.make_mesh(ParallelConfig(2, 2, 1, 2))
    shapes = parallel.abstract_state(LM.init, TX)
    near = parallel.state_shardings(shapes, parallel.param_shardings(LM.axes, shapes.params, mesh))
    far = parallel.offloaded(near)
    objective, ends = OBJECTIVES["next_token"].build(LM), []
    with jax.set_mesh(mesh):
        for shardings in (near, far):
            step, state = (
                parallel.placed_step(make_step(objective, TX), shardings),
                init_state(LM.init, TX, 0, shardings),
            )
            for batch in BATCHES[:3]:
                state, _ = step(state, parallel.place_batch(batch, mesh))
            ends.append(state)
        kinds = lambda tree: {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree)}
        assert kinds(ends[1].opt_state) == {parallel.HOST}
        assert kinds(ends[1].params) == kinds(ends[0].params) == {"device"}
        one, other = (jax.device_get((state.params, state.opt_state)) for state in ends)
        chex.assert_trees_all_equal(one, other)
        checkpoints = open_checkpoints(tmp_path)
        save(checkpoints, ends[1], {})
        back = restore(checkpoints, parallel.with_shardings(shapes, far))
        finish(checkpoints)
    assert kinds(back.opt_state) == {parallel.HOST}
    chex.assert_trees_all_equal(jax.device_get(back.opt_state), other[1])


def test_offloading_where_the_host_cannot_be_reached_is_refused(monkeypatch):
    mesh = parallel.make_mesh(ParallelConfig(8))
    shapes = parallel.abstract_state(LM.init, TX)
    shardings = parallel.state_shardings(shapes, parallel.param_shardings(LM.axes, shapes.params, mesh))
    monkeypatch.setattr(parallel, "HOST", "far_away")
    with pytest.raises(UserError, match=r"parallel.offload.*far_away memory; cpu has device"):
        parallel.offloaded(shardings)


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


def test_rows_go_where_the_devices_hold_them():
    devices = np.asarray(jax.devices())[[3, 1, 7, 0, 5, 2, 6, 4]].reshape(4, 2, 1, 1)
    mesh = Mesh(devices, parallel.MESH_AXES, axis_types=(AxisType.Auto,) * 4)
    rows = {"x": np.arange(32).reshape(16, 2)}
    global_rows = parallel.place_batch(rows, mesh)["x"]
    chex.assert_trees_all_equal(np.asarray(global_rows), rows["x"])
    assert {shard.data.shape for shard in global_rows.addressable_shards} == {(2, 2)}


@pytest.mark.parametrize(
    ("held", "share"),
    [
        ([{0, 1}, {2, 3}], (0, 2)),
        # Hosts of a TPU slice hold squares of chips, whose rows are no neighbours.
        ([{2, 6}, {0, 4}, {1, 5}, {3, 7}], (2, 4)),
        # Two hosts that hold the same rows, in parts of the tensor axis.
        ([{0}, {0}, {1}, {1}], (0, 2)),
        ([{0, 1}, {1, 2}, {2, 0}], None),
    ],
)
def test_what_a_process_feeds(held, share, monkeypatch):
    sizes = (len(set().union(*held)), 1, 1, 1)
    mesh = parallel.make_mesh(ParallelConfig(*sizes))
    # A device here is a pair of process and shard; only its process is asked for.
    pair = namedtuple("pair", "process_index shard")
    shards = {pair(i, start): start for i, starts in enumerate(held) for start in starts}
    monkeypatch.setattr(parallel, "_shards", lambda mesh: shards)
    if share is None:
        with pytest.raises(UserError, match="the same rows of a batch, or none"):
            parallel.row_share(mesh)
    else:
        assert parallel.row_share(mesh) == share
