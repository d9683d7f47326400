"""Where the pure step runs: `jit` over a mesh of devices, or `pmap` over replicas. No other distribution layer exists.

`jit` (the default): parameters and optimiser state are divided by `STORED` rules over (data, fsdp, context, tensor),
rows over (data, fsdp), and the compiler puts the collectives in. State goes in and out pinned and donated.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lmlab.core.errors import UserError, check
from lmlab.core.sharding import MESH_AXES, ROWS, STORED, Rules, spec
from lmlab.core.types import Batch, Key, Params
from lmlab.optim.groups import is_names, path_name
from lmlab.train.config import ParallelConfig
from lmlab.train.state import State, new_state
from lmlab.train.step import Step


def make_mesh(config: ParallelConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh of a job over the given devices (default: all of the job). Raises `UserError` if they do not fit."""
    found = jax.devices() if devices is None else devices
    rest = config.fsdp * config.context * config.tensor
    check(len(found) % rest == 0 or config.data > 0, "parallel", f"{config.fsdp} x {config.context} x {config.tensor}",
          f"fsdp x context x tensor to divide the {len(found)} devices")  # fmt: skip
    shape = (config.data or len(found) // rest, config.fsdp, config.context, config.tensor)
    wanted = math.prod(shape)
    check(wanted <= len(found), "parallel", " x ".join(map(str, shape)),
          f"a mesh of at most {len(found)} devices, those that JAX has found", "See lmlab doctor.")  # fmt: skip
    check(wanted == len(found) or jax.process_count() == 1, "parallel", " x ".join(map(str, shape)),
          f"a mesh of all {len(found)} devices of the job, since every process computes")  # fmt: skip
    kinds = (AxisType.Auto,) * len(MESH_AXES)
    return jax.make_mesh(shape, MESH_AXES, axis_types=kinds, devices=found[:wanted])


class Placed(NamedTuple):
    """A parameter and where it lies; a row of the table of shardings."""

    path: str
    shape: tuple[int, ...]
    names: tuple[str, ...]
    spec: PartitionSpec


def placements(axes: Any, params: Params, mesh: Mesh, rules: Rules = STORED) -> list[Placed]:
    """The table of shardings. Raises `UserError` naming the dimension that does not divide.

    axes: `LM.axes`. params: arrays or shapes.
    """
    table = []
    names_by_leaf = jax.tree.leaves(axes, is_leaf=is_names)
    for (path, leaf), names in zip(jax.tree_util.tree_leaves_with_path(params), names_by_leaf, strict=True):
        placed = Placed(path_name(path), leaf.shape, names, spec(names, rules))
        _check_divides(placed, mesh)
        table.append(placed)
    return table


def _check_divides(placed: Placed, mesh: Mesh) -> None:
    for size, name, wanted in zip(placed.shape, placed.names, placed.spec, strict=True):
        axes = (wanted,) if isinstance(wanted, str) else wanted or ()
        parts = math.prod(mesh.shape[axis] for axis in axes)
        if size % parts:
            raise UserError(f"parallel.{'.'.join(axes)}", parts,
                            f"a divisor of {size}, the dimension {name!r} of {placed.path} {list(placed.shape)}",
                            "Choose another mesh, or pad the model.")  # fmt: skip


def param_shardings(axes: Any, params: Params, mesh: Mesh, rules: Rules = STORED) -> Any:
    """A NamedSharding for each parameter, as a tree like `params`."""
    table = placements(axes, params, mesh, rules)
    treedef = jax.tree.structure(params)
    return jax.tree.unflatten(treedef, [NamedSharding(mesh, placed.spec) for placed in table])


def state_shardings(state: State, params: Any) -> State:
    """A NamedSharding for each array of a state.

    What mirrors a parameter (its path ends in the parameter's, and the shape is the same) lies where that one does:
    moments, averages, master copies. Everything else is on every device.

    state: arrays or shapes. params: the shardings of its parameters.
    """
    mesh = jax.tree.leaves(params)[0].mesh
    whole = NamedSharding(mesh, PartitionSpec())
    shapes = jax.tree_util.tree_leaves_with_path(state.params)
    known = {
        tuple(path): (leaf.shape, sharding)
        for (path, leaf), sharding in zip(shapes, jax.tree.leaves(params), strict=True)
    }

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        for start in range(len(path)):
            shape, sharding = known.get(tuple(path[start:]), (None, whole))
            if shape == leaf.shape:
                return sharding
        return whole

    return jax.tree_util.tree_map_with_path(place, state)


def abstract_state(init: Callable[[Key], Params], tx: optax.GradientTransformation) -> State:
    """Shapes and types of the state of a new run."""
    return jax.eval_shape(lambda key: new_state(init(key), tx, key), jax.random.key(0))


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """The shapes, each with its sharding: what a checkpoint is restored into."""
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, shardings)


def check_rows(mesh: Mesh, batch_size: int, microbatches: int = 1) -> None:
    """Raise `UserError` unless the rows of a microbatch can be dealt evenly to (data, fsdp)."""
    shards = math.prod(mesh.shape[axis] for axis in ROWS)
    check(batch_size % (microbatches * shards) == 0, "data.batch_size", batch_size,
          f"a multiple of train.microbatches x parallel.data x parallel.fsdp = {microbatches * shards}",
          "Each device takes the same number of rows: change one of them.")  # fmt: skip


def row_sharding(mesh: Mesh) -> NamedSharding:
    """Where batches lie: their first axis over (data, fsdp)."""
    return NamedSharding(mesh, PartitionSpec(ROWS))


class Share(NamedTuple):
    """The part of a global batch that this process feeds: part `host` of `hosts` equal parts, in order."""

    host: int
    hosts: int


def row_share(mesh: Mesh) -> Share:
    """Which rows the devices of this process hold. Processes that hold the same rows get the same share.

    Raises `UserError` where they do not hold one block of them.
    """
    shards = math.prod(mesh.shape[axis] for axis in ROWS)
    by_device = row_sharding(mesh).addressable_devices_indices_map((shards,))
    held = sorted({cut[0].indices(shards)[0] for cut in by_device.values() if cut})
    block = len(held)
    fits = held == list(range(held[0], held[0] + block)) and held[0] % block == 0 and shards % block == 0
    check(fits, "parallel", dict(mesh.shape), "a mesh in which each process holds neighbouring rows of the batch",
          "Let data x fsdp be a multiple of the processes.")  # fmt: skip
    return Share(held[0] // block, shards // block)


def place_batch(batch: Batch, mesh: Mesh) -> Batch:
    """The global batch from the rows of this process (its `row_share`), without a copy on any other device."""
    sharding = row_sharding(mesh)
    count = row_share(mesh).hosts

    def place(x: Any) -> jax.Array:
        x = np.asarray(x)
        return jax.make_array_from_process_local_data(sharding, x, (x.shape[0] * count, *x.shape[1:]))

    return jax.tree.map(place, batch)


def placed_step(step: Step, shardings: State) -> Step:
    """The step as one program over the mesh of `shardings`: state pinned and donated, metrics on every device."""
    mesh = jax.tree.leaves(shardings)[0].mesh
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.jit(
        step, in_shardings=(shardings, row_sharding(mesh)), out_shardings=(shardings, whole), donate_argnums=0
    )
