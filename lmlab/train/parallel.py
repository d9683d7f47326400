"""Where the pure step runs: `jit` over a mesh of devices, or `pmap` over replicas. No other distribution layer exists.

`jit` (the default): parameters and optimiser state are divided by `STORED` rules over (data, fsdp, context, tensor),
rows over (data, fsdp), and the compiler puts the collectives in. State goes in and out pinned and donated.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lmlab.core.errors import UserError, check
from lmlab.core.sharding import MESH_AXES, ROWS, STORED, Rules, spec
from lmlab.core.types import Batch, Key, Objective, Params
from lmlab.optim.groups import is_names, path_name
from lmlab.train.config import ParallelConfig
from lmlab.train.state import State, Still, new_state
from lmlab.train.step import Metrics, Step, make_step


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
    # Some slices of TPUs make some of these shapes only where an axis of the network may be split.
    ordered = mesh_utils.create_device_mesh(shape, found[:wanted], allow_split_physical_axes=True)
    return Mesh(ordered, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


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

    What mirrors a parameter (its path ends in the parameter's, perhaps with one more name, and it has as many axes)
    lies like that one along every axis of the same size: moments, averages, master copies whole; projected moments,
    projectors and codes of 8 bits along the axes that they share. Everything else is on every device.

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
        for end in (len(path), len(path) - 1):
            for start in range(end):
                shape, sharding = known.get(tuple(path[start:end]), ((), whole))
                if len(shape) == len(leaf.shape) > 0:
                    return _shared(sharding, shape, leaf.shape)
        return whole

    return jax.tree_util.tree_map_with_path(place, state)


def _shared(sharding: NamedSharding, shape: tuple[int, ...], other: tuple[int, ...]) -> NamedSharding:
    """The sharding of an array of another shape, along the axes that have the same size."""
    if shape == other:
        return sharding
    wanted = [*sharding.spec, *[None] * (len(shape) - len(sharding.spec))]
    kept = [axes if a == b else None for axes, a, b in zip(wanted, shape, other, strict=True)]
    return NamedSharding(sharding.mesh, PartitionSpec(*kept))


def abstract_state(
    init: Callable[[Key], Params], tx: optax.GradientTransformation, still: Still = ()
) -> State:  # fmt: skip
    """Shapes and types of the state of a new run."""
    return jax.eval_shape(lambda key: new_state(init(key), tx, key, still), jax.random.key(0))


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
    """The part of a global batch that this process feeds: part `host` of `hosts` equal parts."""

    host: int
    hosts: int


def row_share(mesh: Mesh) -> Share:
    """Which part of the rows this process feeds. Processes whose devices hold the same rows have the same share.

    Raises `UserError` where what two processes hold overlaps in part.
    """
    held: dict[int, set[int]] = {}
    for device, start in _shards(mesh).items():
        held.setdefault(device.process_index, set()).add(start)
    parts = sorted({tuple(sorted(starts)) for starts in held.values()})
    fits = len({len(part) for part in parts}) == 1 and sum(map(len, parts)) == math.prod(mesh.shape[a] for a in ROWS)
    check(fits, "parallel", dict(mesh.shape), "a mesh in which two processes hold the same rows of a batch, or none",
          "Let context x tensor divide the devices of a process, or the processes divide it.")  # fmt: skip
    return Share(parts.index(tuple(sorted(held[jax.process_index()]))), len(parts))


def _shards(mesh: Mesh) -> dict[jax.Device, int]:
    """Which of the data x fsdp parts of the rows each device holds."""
    count = math.prod(mesh.shape[axis] for axis in ROWS)
    places = row_sharding(mesh).devices_indices_map((count,))
    return {device: cut[0].indices(count)[0] for device, cut in places.items() if cut}


def place_batch(batch: Batch, mesh: Mesh) -> Batch:
    """The global batch from the rows of this process (its `row_share`); no other row passes through it."""
    sharding, shards = row_sharding(mesh), _shards(mesh)
    mine = sorted({start for device, start in shards.items() if device.process_index == jax.process_index()})

    def place(x: Any) -> jax.Array:
        x = np.asarray(x)
        check(len(x) % len(mine) == 0, "batch", len(x), f"a multiple of {len(mine)} rows, one or more a device")
        size = len(x) // len(mine)
        # The devices of a process need not hold neighbouring rows: its rows go to them in the order of the shards.
        begins = {start * size: place * size for place, start in enumerate(mine)}
        rows = lambda index: x[begins[index[0].start or 0] :][:size]
        return jax.make_array_from_callback((size * len(set(shards.values())), *x.shape[1:]), sharding, rows)

    return jax.tree.map(place, batch)


HOST = "pinned_host"
"""The memory of the host that devices read and write by themselves."""


def offloaded(shardings: State) -> State:
    """The same shardings, with the optimiser state in the memory of the host.

    Raises `UserError` where the devices have no way to it.
    """
    device = jax.tree.leaves(shardings)[0].mesh.devices.flat[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    check(HOST in kinds, "parallel.offload", "optimizer", f"devices that reach {HOST} memory; {device.device_kind} has "
          f"{', '.join(kinds)}", "Use none.")  # fmt: skip
    return replace(shardings, opt_state=jax.tree.map(lambda x: x.with_memory_kind(HOST), shardings.opt_state))


def placed_step(step: Step, shardings: State) -> Step:
    """The step as one program over the mesh of `shardings`: state pinned and donated, metrics on every device."""
    mesh = jax.tree.leaves(shardings)[0].mesh
    whole = NamedSharding(mesh, PartitionSpec())

    def near(state: State, batch: Batch) -> tuple[State, Metrics]:
        """The step, with what waits in the memory of the host brought to the devices."""
        return step(replace(state, opt_state=jax.device_put(state.opt_state, jax.memory.Space.Device)), batch)

    far = any(place.memory_kind == HOST for place in jax.tree.leaves(shardings.opt_state))
    return jax.jit(
        near if far else step, in_shardings=(shardings, row_sharding(mesh)), out_shardings=(shardings, whole),
        donate_argnums=0,
    )  # fmt: skip


REPLICAS = "replicas"
"""The axis that `pmapped_step` maps over."""


def pmapped_step(objective: Objective, tx: optax.GradientTransformation, microbatches: int = 1) -> Step:
    """The same step under `jax.pmap`: whole copies of the state, the gradient summed by a `psum` over the devices.

    Takes `replicate(state)` and `deal_rows(batch)`. An objective that draws random numbers draws the same ones on
    every replica.
    """
    add_up = lambda sums: jax.lax.psum(sums, REPLICAS)
    step = make_step(objective, tx, microbatches=microbatches, reduce=add_up)
    return jax.pmap(step, axis_name=REPLICAS, donate_argnums=0)


def replicate(state: State, replicas: int) -> State:
    """The state with a first axis of equal copies."""
    return jax.tree.map(lambda x: jnp.stack([x] * replicas), state)


def deal_rows(batch: Batch, replicas: int) -> Batch:
    """[B, ...] -> [replicas, B / replicas, ...]."""
    return jax.tree.map(lambda x: x.reshape(replicas, -1, *x.shape[1:]), batch)
