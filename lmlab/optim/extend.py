"""The state of an optimiser for parameters that have grown."""

from typing import Any

import jax
import optax

from lmlab.core.errors import check
from lmlab.core.types import Array
from lmlab.optim.galore import GaloreState
from lmlab.optim.groups import path_name


def extend_state(old: Any, fresh: Any) -> Any:
    """The old state with room for what is new: old arrays in the first places of every axis, the rest as in `fresh`.

    fresh: the state that the transform makes of the grown parameters. So moments are zero where parameters are new, and
    master copies are the new parameters there. Counts go on, but for those of schedules: those begin anew. Raises
    `UserError` where the states are not of one transform, something has shrunk, or moments are factored or projected.
    """
    # Optax factors a matrix along the largest two of its axes, and growth may change which is the larger one: then what
    # was kept of the rows would fit the columns. Projectors know nothing of new rows, and would leave them as they are;
    # blocks of 8 bits are cut by the length of an axis.
    check(
        not any(map(_is_bound_to_shapes, jax.tree.leaves(old, is_leaf=_is_bound_to_shapes))),
        "optimiser state",
        "factored or projected",
        "one with a moment for every parameter",
        "What adafactor and projected gradients keep can not be extended: use --optimizer reset.",
    )
    same = str(jax.tree.structure(old)) == str(jax.tree.structure(fresh))
    check(same, "optimiser state", "of the trained model",
          "one of the same rule", "Or begin with a new state.")  # fmt: skip

    def extended(path: Any, old: Any, fresh: Any) -> Any:
        return fresh if _is_schedule(old) else _corner(path_name(path), old, fresh)

    return jax.tree_util.tree_map_with_path(extended, old, fresh, is_leaf=_is_schedule)


def _is_bound_to_shapes(node: Any) -> bool:
    return isinstance(node, optax.FactoredState | GaloreState)


def _is_schedule(node: Any) -> bool:
    return isinstance(node, optax.ScaleByScheduleState)


def _corner(name: str, old: Array, fresh: Array) -> Array:
    fits = old.ndim == fresh.ndim and all(a <= b for a, b in zip(old.shape, fresh.shape, strict=True))
    check(fits, f"optimiser state {name}", list(old.shape), f"a part of {list(fresh.shape)}", "Begin with a new state.")
    return old if old.shape == fresh.shape else fresh.at[tuple(slice(0, size) for size in old.shape)].set(old)
