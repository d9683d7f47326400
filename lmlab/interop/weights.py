"""Parameters from a `Source`: checked as a whole first, then read from disk straight to where each part is to lie."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from lmlab.core.errors import UserError, check
from lmlab.core.types import Array, Params
from lmlab.interop.source import Source
from lmlab.interop.tensors import Part, head_name, parts_of, read_part
from lmlab.models.config import TransformerConfig
from lmlab.models.lm import LM
from lmlab.models.transformer import transformer

Place: TypeAlias = Callable[[LM, Any], Any]
"""`place(lm, shapes) -> shardings`, both trees like the parameters."""

_ROWS = 4096
"""Rows of an embedding that are compared at once."""


def leaf_shapes(lm: LM) -> tuple[dict[str, tuple[int, ...]], Any]:
    """Shapes of the parameters by dotted path, and as a tree of `jax.ShapeDtypeStruct`."""
    tree = jax.eval_shape(lm.init, jax.random.key(0))
    return {path: leaf.shape for path, leaf in flat_leaves(tree).items()}, tree


def flat_leaves(tree: Any) -> dict[str, Any]:
    """Leaves of a tree of dicts by dotted path."""
    found = jax.tree_util.tree_leaves_with_path(tree)
    return {".".join(str(key.key) for key in path): leaf for path, leaf in found}


def check_tensors(source: Source, parts: list[Part], tied: bool) -> None:
    """Names and shapes of all tensors of a source are those of the model, and a tied head is the embedding.

    Raises:
        UserError: a tensor is missing, of another shape, or not of this model.
    """
    expected = {part.tensor: part.shape for part in parts}
    missing = [name for name in expected if name not in source.shapes]
    if missing:
        head = "The head has no tensor of its own: set tie_word_embeddings in config.json if it is the embedding."
        raise UserError(source.origin, _some(missing), "all tensors of the model that config.json describes; these "
                        "are missing", head if missing == [parts[-1].tensor] else "")  # fmt: skip
    for name, shape in expected.items():
        check(tuple(source.shapes[name]) == shape, f"{source.origin}: {name}", list(source.shapes[name]),
              f"the shape {list(shape)}, by config.json")  # fmt: skip
    spare = head_name(source.config["model_type"]) if tied else None
    unexpected = [name for name in source.shapes if name not in expected and name != spare]
    check(not unexpected, source.origin, _some(unexpected), "no tensors that config.json does not account for; these "
          "are too many", "The file holds another model, or adapters that must be merged first.")  # fmt: skip
    if spare and spare in source.shapes:
        _check_same(source, parts[0].tensor, spare)


def _check_same(source: Source, embedding: str, head: str) -> None:
    rows, same = source.shapes[embedding][0], source.shapes[embedding] == source.shapes[head]
    for start in range(0, rows if same else 0, _ROWS):
        block = (slice(start, min(start + _ROWS, rows)),)
        same = same and np.array_equal(source.read(embedding, block), source.read(head, block))
    check(same, f"{source.origin}: {head}", "another table than the embedding", "the embedding, since config.json has "
          "tie_word_embeddings = true", "Set it to false to use the head.")  # fmt: skip


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def first_device(lm: LM, shapes: Any) -> Any:
    """The `Place` of all parameters on the first device."""
    del lm
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda _: sharding, shapes)


def load_params(
    source: Source, config: TransformerConfig, *, dtype: str = "float32", place: Place | None = None
) -> Params:  # fmt: skip
    """The parameters of a source, each part read by the process and put on the device that it is for.

    The host holds one device's part of one parameter at a time. All is checked before anything is read.

    Args:
        source: where they are.
        config: the model, by `families.read_config(source.config)`.
        dtype: of the parameters, "float32" or "bfloat16".
        place: where they lie; None: on the first device.

    Raises:
        UserError: the tensors are not those of the model, or cannot be read.
    """
    lm = transformer(config)
    shapes, tree = leaf_shapes(lm)
    parts = parts_of(source.config["model_type"], shapes)
    check_tensors(source, parts, config.tied)
    by_leaf: dict[str, list[Part]] = {}
    for part in parts:
        by_leaf.setdefault(part.leaf, []).append(part)
    shardings = flat_leaves((place or first_device)(lm, tree))
    # The largest first: its copy on the host goes before the others fill the memory.
    order = sorted(shapes, key=lambda path: -np.prod(shapes[path]))
    arrays = {
        path: _load_leaf(source, by_leaf[path], shapes[path], jnp.dtype(dtype), shardings[path]) for path in order
    }
    treedef = jax.tree.structure(tree)
    return jax.tree.unflatten(treedef, [arrays[path] for path in flat_leaves(tree)])


def _load_leaf(
    source: Source, parts: list[Part], shape: tuple[int, ...], dtype: np.dtype, sharding: jax.sharding.Sharding
) -> Array:  # fmt: skip
    """One parameter. A part that several devices hold is read once."""
    devices: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        ranges = tuple(part.indices(size)[:2] for part, size in zip(index or (), shape, strict=True))
        devices.setdefault(ranges, []).append(device)
    pieces = []
    for ranges, holders in devices.items():
        block = _read_block(source, parts, [slice(*pair) for pair in ranges], dtype)
        pieces += [jax.device_put(block, device) for device in holders]
        # What was handed over must not wait for the next one to be read.
        jax.block_until_ready(pieces[-len(holders) :])
    return jax.make_array_from_single_device_arrays(shape, sharding, pieces)


def _read_block(source: Source, parts: list[Part], ranges: list[slice], dtype: np.dtype) -> np.ndarray:
    out = np.empty([part.stop - part.start for part in ranges], dtype)
    for part in parts:
        place: list[int | slice] = []
        window: dict[str, slice] = {}
        letters = iter(part.letters)
        for index, wanted in zip(part.block, ranges, strict=True):
            if index is None:
                window[next(letters)] = wanted
                place.append(slice(None))
            elif wanted.start <= index < wanted.stop:
                place.append(index - wanted.start)
            else:
                break
        else:
            out[tuple(place)] = read_part(part, source.read, window)
    return out
