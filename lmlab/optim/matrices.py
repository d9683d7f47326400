"""Parameters as batches of matrices: which ones, where their axes lie, and the shapes that a projection makes of them.

What is projected keeps the number and order of the parameter's axes: the axes that go are replaced by one of size r and
ones. So it lies on a mesh like the parameter along all axes that stay.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax

from lmlab.core.errors import UserError, check
from lmlab.core.types import Array
from lmlab.optim.groups import MatrixAxes, is_names, matching, matrix_axes, path_name

Choice: TypeAlias = Callable[[str, tuple[int, ...]], MatrixAxes | None]
"""`choice(path, shape)`: how this parameter is a batch of matrices to project; None: it is left alone."""
Side: TypeAlias = Literal["std", "reverse_std", "left", "right", "two_sided"]
"""Which side of a matrix [m, n] is projected: std the shorter one (the rows of a square one), reverse_std the other;
left the rows, right the columns, two_sided both."""


def by_axes(axes: Any, include: tuple[str, ...] = ()) -> Choice:
    """All hidden matrices by logical axes (`LM.axes`), or those whose path contains a match of one of the patterns."""
    leaves = jax.tree_util.tree_leaves_with_path(axes, is_leaf=is_names)
    wanted = jax.tree.leaves(matching(axes, include or ("",)))
    known = {
        path_name(path): matrix_axes(names) if chosen else None
        for (path, names), chosen in zip(leaves, wanted, strict=True)
    }
    return lambda path, shape: _known(known, path, shape)


def by_numbers(numbers: Any) -> Choice:
    """By a tree like the parameters of `optax.contrib.MuonDimensionNumbers` (or alike) and None.

    Axes that are neither of reduction nor of output count matrices.
    """
    is_leaf = lambda leaf: leaf is None or hasattr(leaf, "reduction_axis")
    known = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(numbers, is_leaf=is_leaf)}

    def choice(path: str, shape: tuple[int, ...]) -> MatrixAxes | None:
        leaf = _known(known, path, shape)
        if leaf is None:
            return None
        positive = lambda axes: tuple(axis % len(shape) for axis in ((axes,) if isinstance(axes, int) else axes))
        rows, columns = positive(leaf.reduction_axis), positive(leaf.output_axis)
        batch = tuple(axis for axis in range(len(shape)) if axis not in rows + columns)
        check(len({*rows, *columns}) == len(rows + columns) and bool(rows) and bool(columns), f"numbers of {path}",
              (rows, columns), "two disjoint groups of axes")  # fmt: skip
        return MatrixAxes(batch, rows, columns)

    return choice


def by_path(*patterns: str) -> Choice:
    """Parameters with two axes whose path contains a match of one of the patterns; without patterns all of them.

    For trees whose layers lie apart: stacked ones hide matrices, and make norms look like some. The choice raises
    `UserError` for a parameter with more than two axes that is meant.
    """

    def choice(path: str, shape: tuple[int, ...]) -> MatrixAxes | None:
        meant = jax.tree.leaves(matching({path: 0}, patterns or ("",)))[0]
        check(not meant or len(shape) <= 2, f"parameter {path}", shape, "two axes",
              "It may hold several matrices: choose by_axes or by_numbers.")  # fmt: skip
        return MatrixAxes((), (0,), (1,)) if meant and len(shape) == 2 else None

    return choice


def _known(known: dict[str, Any], path: str, shape: tuple[int, ...]) -> Any:
    if path not in known:
        raise UserError(f"parameter {path}", shape, "one of the tree that says which parameters are matrices",
                        "Give the tree of these parameters.")  # fmt: skip
    return known[path]


class Layout(NamedTuple):
    """A parameter to be projected: static, found from its path and shape."""

    axes: MatrixAxes
    shape: tuple[int, ...]
    rank: int
    left: bool
    """Are the rows projected?"""
    right: bool

    @property
    def batch(self) -> tuple[int, ...]:
        """Sizes of the axes that count matrices."""
        return tuple(self.shape[axis] for axis in self.axes.batch)

    @property
    def rows(self) -> int:
        """M."""
        return math.prod(self.shape[axis] for axis in self.axes.rows)

    @property
    def columns(self) -> int:
        """N."""
        return math.prod(self.shape[axis] for axis in self.axes.columns)

    @property
    def number(self) -> int:
        """How many matrices the parameter holds."""
        return math.prod(self.batch)

    @property
    def low_shape(self) -> tuple[int, ...]:
        """Shape of the projected gradient."""
        shape = _replaced(self.shape, self.axes.rows, self.rank) if self.left else self.shape
        return _replaced(shape, self.axes.columns, self.rank) if self.right else shape

    @property
    def left_shape(self) -> tuple[int, ...]:
        """Shape of the projector of the rows, matrices [m, r]."""
        return _replaced(self.shape, self.axes.columns, self.rank)

    @property
    def right_shape(self) -> tuple[int, ...]:
        """Shape of the transposed projector of the columns, matrices [r, n]."""
        return _replaced(self.shape, self.axes.rows, self.rank)

    @property
    def count_shape(self) -> tuple[int, ...]:
        """Shape of one number for each matrix, to be broadcast against the parameter."""
        return _replaced(_replaced(self.shape, self.axes.rows, 1), self.axes.columns, 1)


def _replaced(shape: tuple[int, ...], axes: tuple[int, ...], size: int) -> tuple[int, ...]:
    return tuple(size if i == axes[0] else 1 if i in axes else old for i, old in enumerate(shape))


def layout(axes: MatrixAxes, shape: tuple[int, ...], rank: float, side: Side) -> Layout:
    """The layout of a parameter. rank: an int, cut to the shorter side, or a share in (0, 1) of the shorter side."""
    listed = sorted((*axes.batch, *axes.rows, *axes.columns))
    check(listed == list(range(len(shape))) and list(axes.batch) == sorted(axes.batch), "matrices", axes,
          f"all axes of {shape} once, those that count matrices in order")  # fmt: skip
    rows, columns = (math.prod(shape[axis] for axis in group) for group in (axes.rows, axes.columns))
    shorter = min(rows, columns)
    size = max(1, round(rank * shorter)) if 0 < rank < 1 else min(int(rank), shorter)
    std_left = rows <= columns
    left = {"std": std_left, "reverse_std": not std_left, "left": True, "right": False, "two_sided": True}[side]
    return Layout(axes, shape, size, left, right=not left or side == "two_sided")


class Leaf(NamedTuple):
    """A parameter of a tree, before anything is computed."""

    name: str
    layout: Layout | None
    """None if it is not chosen."""
    first: int
    """Its matrices are numbered from here on among the chosen ones of the tree."""


def chosen_leaves(tree: Any, matrices: Choice, rank: float, side: Side) -> list[Leaf]:
    """All parameters of a tree, in order. Raises `UserError` if none is chosen.

    A tree without leaves is a placeholder of optax, and nothing to complain about.
    """
    found, first = [], 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = path_name(path)
        axes = matrices(name, leaf.shape)
        how = axes and layout(axes, leaf.shape, rank, side)
        found.append(Leaf(name, how, first))
        first += how.number if how else 0
    check(not found or first > 0, "matrices", f"none of {len(found)} parameters", "a choice of one or more",
          f"Their paths: {', '.join(leaf.name for leaf in found[:3])}, ...")  # fmt: skip
    return found


def to_matrices(x: Array, axes: MatrixAxes) -> Array:
    """A parameter, or what was made of it, as matrices [*batch, m, n]."""
    sizes = lambda group: [x.shape[axis] for axis in group]
    ordered = x.transpose(*axes.batch, *axes.rows, *axes.columns)
    return ordered.reshape(*sizes(axes.batch), math.prod(sizes(axes.rows)), math.prod(sizes(axes.columns)))


def from_matrices(matrices: Array, axes: MatrixAxes, shape: tuple[int, ...]) -> Array:
    """Matrices [*batch, m, n] in the shape that `to_matrices` had them from."""
    order = (*axes.batch, *axes.rows, *axes.columns)
    back = sorted(range(len(order)), key=order.__getitem__)
    return matrices.reshape([shape[axis] for axis in order]).transpose(back)
