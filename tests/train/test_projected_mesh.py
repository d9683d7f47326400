"""Projected gradients on meshes: the numbers of one device, state in parts, and no gradient is ever gathered."""

import math

import chex
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from meshes import BATCHES, LM, placed, trained

from benchmarks.scaling import ARRAY, COLLECTIVE
from lmlab.optim.chain import build_optimizer
from lmlab.optim.config import GaloreConfig, OptimConfig, ScheduleConfig
from lmlab.optim.galore import scale_by_galore
from lmlab.optim.matrices import by_axes
from lmlab.optim.quantised import SIGNED8
from lmlab.optim.subspace import cholesky_qr, subspace_iteration
from lmlab.testing.tables import OBJECTIVES
from lmlab.train import parallel
from lmlab.train.config import ParallelConfig
from lmlab.train.state import State

ROWS, COLUMNS, RANK = 64, 96, 4


def optimizer(**galore):
    config = GaloreConfig(**{"rank": RANK, "refresh_every": 2, **galore})
    return build_optimizer(
        OptimConfig(eps=1e-3, schedule=ScheduleConfig(peak=1e-3, warmup=0), galore=config), LM.axes, 20
    )


@pytest.mark.parametrize(
    ("sizes", "galore"),
    [
        ((2, 2, 1, 2), {"moments": "rotate", "timing": "stagger", "orthonormalise": "cholesky"}),
        ((1, 8, 1, 1), {"update": "fira", "side": "reverse_std"}),
    ],
    ids=["rotated", "fira"],
)
def test_a_mesh_gives_the_numbers_of_one_device(sizes, galore):
    objective, few = OBJECTIVES["next_token"].build(LM), BATCHES[:3]
    one, other = (trained(objective, mesh, tx=optimizer(**galore), batches=few) for mesh in (None, sizes))
    chex.assert_trees_all_close(other, one, atol=1e-4, rtol=1e-3)


def test_state_lies_like_the_parameter_along_what_they_share():
    mesh = parallel.make_mesh(ParallelConfig(2, 2, 1, 2))
    with jax.set_mesh(mesh):
        state = placed(LM, optimizer(), mesh)[1].opt_state[1]
    kernel = lambda tree: tree["layers"]["mlp"]["gate_up"]["kernel"].sharding.spec
    # [layers, embed 16, stack, ffn 24]: rows are projected, columns stay.
    assert kernel(state.left) == PartitionSpec(None, "fsdp", None, None)
    assert kernel(state.inner.mu) == kernel(state.inner.nu) == PartitionSpec(None, None, None, "tensor")
    assert state.inner.mu["embedding"].sharding.spec == PartitionSpec("tensor", "fsdp")


def test_codes_of_8_bits_lie_like_the_numbers_that_they_stand_for():
    mesh = parallel.make_mesh(ParallelConfig(1, 4, 1, 2))
    params = {"w": jax.ShapeDtypeStruct((ROWS, COLUMNS), jnp.float32)}
    moment = jax.eval_shape(SIGNED8.encode, params["w"])
    state = State(jax.ShapeDtypeStruct((), jnp.int32), params, {"mu": {"w": moment}, "count": params["w"]}, None)
    place = {"w": NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))}
    found = parallel.state_shardings(state, place).opt_state
    assert found["mu"]["w"].codes.spec == PartitionSpec("fsdp", "tensor")
    assert found["mu"]["w"].scales.spec == PartitionSpec("fsdp", None)
    assert found["count"].spec == PartitionSpec()


def moved(spec, side, refresh):
    """Shapes of what a compiled update of one matrix [64, 96] moves between eight devices, by being in a branch."""
    mesh = parallel.make_mesh(ParallelConfig(1, 4, 1, 2) if len([a for a in spec if a]) == 2 else ParallelConfig(1, 8))
    tx = scale_by_galore(by_axes({"w": ("embed", "ffn")}), RANK, side=side, refresh=refresh)
    params = {"w": jax.ShapeDtypeStruct((ROWS, COLUMNS), jnp.float32)}
    state = State(jax.ShapeDtypeStruct((), jnp.int32), params, jax.eval_shape(tx.init, params), None)
    place = {"w": NamedSharding(mesh, spec)}
    shardings = parallel.state_shardings(state, place).opt_state
    update = jax.jit(tx.update, in_shardings=(place, shardings), out_shardings=(place, shardings))
    with jax.set_mesh(mesh):
        text = update.lower(params, state.opt_state).compile().as_text()
    inside, always, name = [], [], ""
    for line in text.splitlines():
        name = line if line.rstrip().endswith("{") else name
        found = COLLECTIVE.search(line)
        if found:
            shapes = [
                tuple(int(n) for n in array["shape"].split(",") if n) for array in ARRAY.finditer(found["result"])
            ]
            (always if name.startswith("ENTRY") else inside).extend((found["kind"], shape) for shape in shapes)
    return inside, always


REFRESH = subspace_iteration(orthonormalise=cholesky_qr)


def test_along_the_side_that_stays_one_sum_of_m_by_r_is_all():
    """The longer side is divided, the rows are projected: P is whole everywhere, R and moments are divided."""
    inside, always = moved(PartitionSpec(None, "fsdp"), "left", REFRESH)
    big = [(kind, shape) for kind, shape in inside if math.prod(shape) > RANK * RANK]
    assert big == [("all-reduce", (ROWS, RANK))]
    assert all(math.prod(shape) <= 1 for _, shape in always)


def test_divided_along_both_sides_nothing_larger_than_a_basis_is_moved():
    for refresh in (REFRESH, subspace_iteration()):
        inside, always = moved(PartitionSpec("fsdp", "tensor"), "left", refresh)
        assert inside
        assert max(math.prod(shape) for _, shape in inside + always) <= COLUMNS * RANK
