"""Where state, batches and checkpoints lie on a mesh, and which meshes are refused."""

from collections import namedtuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec
from meshes import BATCHES, LM, TX, placed

from lmlab.core.errors import UserError
from lmlab.testing.tables import OBJECTIVES
from lmlab.train import parallel
from lmlab.train.checkpoint import finish, open_checkpoints, restore, save
from lmlab.train.config import ParallelConfig
from lmlab.train.state import init_state
from lmlab.train.step import make_step


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
