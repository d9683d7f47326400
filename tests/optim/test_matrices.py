"""Parameters as batches of matrices: which are chosen, and there and back again."""

import chex
import jax
import optax
import pytest

from lmlab.core.errors import UserError
from lmlab.optim.groups import MatrixAxes
from lmlab.optim.matrices import by_numbers, by_path, from_matrices, layout, to_matrices

FLAT = MatrixAxes((), (0,), (1,))


def test_matrices_there_and_back():
    x = jax.random.normal(jax.random.key(0), (2, 3, 4, 5))
    for axes in (MatrixAxes((1,), (0, 3), (2,)), MatrixAxes((), (2,), (3, 0, 1)), MatrixAxes((0, 2), (3,), (1,))):
        chex.assert_trees_all_equal(from_matrices(to_matrices(x, axes), axes, x.shape), x)


def test_choices_by_path_and_numbers():
    choice = by_path("attention", "mlp")
    assert choice("attention/q", (3, 4)) == FLAT
    assert choice("attention/bias", (4,)) is None
    assert choice("head", (3, 4)) is None
    numbers = optax.contrib.MuonDimensionNumbers(reduction_axis=-1, output_axis=(1,))
    choice = by_numbers({"attention": {"q": numbers, "bias": None}, "head": None})
    assert choice("attention/q", (2, 3, 4)) == MatrixAxes((0,), (2,), (1,))
    assert choice("head", (3, 4)) is None
    with pytest.raises(UserError, match="attention/k"):
        choice("attention/k", (3, 4))
    with pytest.raises(UserError, match="disjoint"):
        by_numbers({"w": optax.contrib.MuonDimensionNumbers(0, -2)})("w", (3, 4))
    with pytest.raises(UserError, match="attention/q"):
        by_path("attention")("attention/q", (2, 3, 4))
    with pytest.raises(UserError, match="in order"):
        layout(MatrixAxes((2, 0), (1,), (3,)), (2, 3, 4, 5), 2, "std")


def test_a_tie_goes_to_the_rows():
    assert layout(FLAT, (8, 8), 2, "std").left
    assert layout(FLAT, (8, 8), 2, "reverse_std").right
