"""Which parameters are treated how, decided by path and logical axes. Rank is no guide: stacked layers add an axis
to everything, so that a norm's scale has two and a kernel three or more.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

BATCH_AXES = ("layers", "stack")
"""Logical axes that count matrices, not coordinates."""
TABLES = ("vocab", "positions")
"""Logical axes of look-up tables, which are no linear maps between hidden spaces."""


class MatrixAxes(NamedTuple):
    """How a stacked parameter is a batch of matrices; the three together are all its axes."""

    batch: tuple[int, ...]
    rows: tuple[int, ...]
    """Input axes."""
    columns: tuple[int, ...]
    """Output axes."""


def path_name(path: Sequence[Any]) -> str:
    """A key path of a pytree as text: `layers/attention/query/kernel`."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def matching(tree: Any, patterns: Sequence[str]) -> Any:
    """Tree of bools: does the path contain a match of one of the patterns?"""
    found = lambda path, _: any(re.search(pattern, path_name(path)) for pattern in patterns)
    return jax.tree_util.tree_map_with_path(found, tree, is_leaf=is_names)


def is_names(leaf: Any) -> bool:
    """Whether this is the leaf of a tree of logical axes: a tuple of names."""
    return isinstance(leaf, tuple) and all(isinstance(name, str) for name in leaf)


def matrix_axes(names: tuple[str, ...]) -> MatrixAxes | None:
    """How a parameter with these logical axes is a batch of hidden matrices; None for norms, biases and tables.

    A hidden matrix maps from or to the residual stream, so `embed` is one side of it and all other axes
    that do not count matrices are the other.
    """
    plain = tuple(i for i, name in enumerate(names) if name not in BATCH_AXES)
    if len(plain) < 2 or any(name in TABLES for name in names) or "embed" not in names:
        return None
    batch = tuple(i for i in range(len(names)) if i not in plain)
    embed = names.index("embed")
    others = tuple(i for i in plain if i != embed)
    return MatrixAxes(batch, (embed,), others) if embed == plain[0] else MatrixAxes(batch, others, (embed,))
