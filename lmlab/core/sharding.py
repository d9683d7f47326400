"""The mesh of a job: its axes, where parameters are stored on it, and where tensors are computed.

Names are the logical axes of `LM.axes` and of activations. The mesh is the one that `jax.set_mesh` has put around the
program; without one, or on one device, everything here does nothing.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

import jax
from jax.sharding import AxisType, PartitionSpec

from lmlab.core.types import Array

MESH_AXES = ("data", "fsdp", "context", "tensor")
"""data: replicas; fsdp: replicas that each store a part of every matrix (arXiv 1910.02054, stage 3); context: parts of
the sequence; tensor: parts of every layer (arXiv 1909.08053). From the slowest network to the fastest."""
ROWS = ("data", "fsdp")
"""The axes that rows of a batch are dealt to."""
TOKENS = (*ROWS, "context")
"""The axes that tokens are dealt to: every one of them holds different tokens."""

Rules: TypeAlias = Mapping[str, str | tuple[str, ...]]
"""Mesh axis by logical name. Names that are absent are not divided."""

COMPUTED: Rules = {
    "batch": ROWS, "length": "context", "vocab": "tensor", "heads": "tensor", "kv_heads": "tensor", "ffn": "tensor",
    "param_tokens": "tensor",
}  # fmt: skip
"""Where activations and the weights that meet them are divided while they are computed with."""
STORED: Rules = {
    "embed": "fsdp", "vocab": "tensor", "heads": "tensor", "kv_heads": "tensor", "ffn": "tensor",
    "param_tokens": "tensor",
}  # fmt: skip
"""Where parameters, their gradients and optimiser moments are kept."""


def spec(names: tuple[str | None, ...], rules: Rules) -> PartitionSpec:
    """The PartitionSpec of an array with these logical axes."""
    return PartitionSpec(*(rules.get(name) if name else None for name in names))


def platform() -> str:
    """What the program is compiled for: cpu, gpu or tpu. The mesh knows, also where it is made of devices elsewhere."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device is not None else jax.default_backend()


def devices_in_mesh() -> int:
    """Devices of the mesh around the program; 1 without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.size


def axis_size(*axes: str) -> int:
    """Devices along the given axes of the mesh around the program; 1 for what it lacks."""
    shape = jax.sharding.get_abstract_mesh().shape
    size = 1
    for axis in axes:
        size *= shape.get(axis, 1)
    return size


def auto_axes() -> set[str]:
    """Axes of the mesh that no surrounding `shard_map` has divided."""
    mesh = jax.sharding.get_abstract_mesh()
    return {axis for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto}


def free_axes() -> set[str]:
    """Those of them with more than one device."""
    return {axis for axis in auto_axes() if axis_size(axis) > 1}


def constrain(x: Array, names: tuple[str | None, ...], rules: Rules = COMPUTED) -> Array:
    """Ask the compiler to lay x out by its logical axes, one name (or None) an axis.

    An axis whose size the devices do not divide is left whole, as are mesh axes that a surrounding `shard_map` has
    already divided.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    free = free_axes()
    parts: list[tuple[str, ...] | None] = []
    for size, wanted in zip(x.shape, spec(names, rules), strict=True):
        axes = (wanted,) if isinstance(wanted, str) else wanted or ()
        axes = tuple(axis for axis in axes if axis in free)
        parts.append(axes if axes and size % axis_size(*axes) == 0 else None)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*parts))


def token_axes(batch: int, length: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Axes of the mesh that divide [batch, length] tokens: those of the rows, and those of the places in a row."""
    rows = tuple(axis for axis in ROWS if axis in free_axes()) if batch % axis_size(*ROWS) == 0 else ()
    places = tuple({"context"} & free_axes()) if length % axis_size("context") == 0 else ()
    return rows, places


def sum_over_tokens(
    f: Callable[..., Any], *, own: bool = False, names: Any = None, divided: tuple[tuple[str, ...], ...] = ()
) -> Callable[..., Any]:
    """`f(shared, *arrays_BT)` made of what each device finds in its own tokens; the sums it returns are added up.

    For sums whose terms the partitioner alone would add up over devices too often (the carry of a loop over tokens,
    at every turn) or too widely (a gradient that each device stores a part of).

    Args:
        f: returns sums; or (sums, arrays [B, T, ...]) if `own`, and the second stay where their tokens are.
        own: see `f`.
        names: logical axes of each sum, a tree like the sums; a device is left with what `STORED` gives it of them.
            None: all sums are whole on every device.
        divided: logical axes of each array after [B, T]. Then `f` sees the parts of one device along `tensor` too.
            Empty: the partitioner divides what `f` does along that axis.
    """

    def whole(shared: Any, *arrays: Array) -> Any:
        rows, part = token_axes(*arrays[0].shape[:2])
        if not rows + part:
            return f(shared, *arrays)
        tensor = bool(divided) and _tensor_divides(arrays, divided)
        shapes = jax.eval_shape(f, shared, *arrays)
        shapes = shapes[0] if own else shapes
        given = jax.tree.map(lambda _: (), shapes) if names is None else names
        scattered = jax.tree.map(lambda x, axes: _scattered(x.shape, axes, rows, tensor), shapes, given)

        def local(shared: Any, *arrays: Array) -> Any:
            found = f(shared, *arrays)
            sums = jax.tree.map(partial(_add_up, axes=rows + part), found[0] if own else found, scattered)
            return (sums, found[1]) if own else sums

        inner = [spec(axes, COMPUTED) if tensor else () for axes in divided or ((),) * len(arrays)]
        tokens = tuple(PartitionSpec(rows, part, *axes) for axes in inner)
        specs = jax.tree.map(lambda x, axes, dim: _kept(axes, dim, tensor), shapes, given, scattered)
        return jax.shard_map(
            local, in_specs=(PartitionSpec(), *tokens), out_specs=(specs, tokens[0]) if own else specs,
            axis_names={*rows, *part, *(["tensor"] if tensor else [])}, check_vma=False,
        )(shared, *arrays)  # fmt: skip

    return whole


def _tensor_divides(arrays: tuple[Array, ...], divided: tuple[tuple[str, ...], ...]) -> bool:
    """Whether the devices along `tensor` divide all axes that they are to divide."""
    sizes = [
        size
        for array, axes in zip(arrays, divided, strict=True)
        for size, name in zip(array.shape[2:], axes, strict=True)
        if COMPUTED.get(name) == "tensor"
    ]
    return "tensor" in free_axes() and all(size % axis_size("tensor") == 0 for size in sizes)


def _scattered(shape: tuple[int, ...], names: tuple[str, ...], rows: tuple[str, ...], tensor: bool) -> int:
    """The dimension of a sum that is stored in parts over `fsdp`; -1: none.

    None where the partitioner divides along `tensor`: it would gather that axis first to scatter the other one.
    """
    if "fsdp" not in rows or ("tensor" in free_axes() and not tensor):
        return -1
    found = [i for i, name in enumerate(names) if STORED.get(name) == "fsdp" and shape[i] % axis_size("fsdp") == 0]
    return found[0] if found else -1


def _kept(names: tuple[str, ...], scattered: int, tensor: bool) -> PartitionSpec:
    """What a device keeps of a sum, of the axes that are divided by hand."""
    along = lambda i, name: (
        "fsdp" if i == scattered else "tensor" if tensor and COMPUTED.get(name) == "tensor" else None
    )
    return PartitionSpec(*(along(i, name) for i, name in enumerate(names)))


def _add_up(x: Array, scattered: int, axes: tuple[str, ...]) -> Array:
    if scattered < 0:
        return jax.lax.psum(x, axes)
    x = jax.lax.psum_scatter(x, "fsdp", scatter_dimension=scattered, tiled=True)
    rest = tuple(axis for axis in axes if axis != "fsdp")
    return jax.lax.psum(x, rest) if rest else x
