"""Weights that are low-rank themselves, the baselines of projected gradients: LoRA and factorised matrices.

Both are functions on parameters, so that any objective takes them: `lambda factors, batch, key:
objective(with_products(params, factors, ...), batch, key)`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lmlab.core.rng import key_for
from lmlab.core.types import Array, Key, Params
from lmlab.optim.matrices import Choice, Layout, Leaf, chosen_leaves, from_matrices


class Factors(NamedTuple):
    """Two factors [*batch, m, r] and [*batch, r, n] of the matrices of a parameter."""

    down: Array
    up: Array


def lora_factors(params: Params, matrices: Choice, rank: float, key: Key) -> dict[str, Factors]:
    """Factors whose product is zero (arXiv 2106.09685, section 4.1), by the paths of the chosen parameters.

    `down` is normal with variance 1 / m.
    """
    return _made(params, matrices, rank, key, lambda how, key, leaf: _random(how, key, 1.0, zero=True))


def random_factors(params: Params, matrices: Choice, rank: float, key: Key) -> dict[str, Factors]:
    """Factors whose product has entries of the variance that those of each chosen parameter have: for W = A B."""
    return _made(params, matrices, rank, key, lambda how, key, leaf: _random(how, key, jnp.std(leaf), zero=False))


def _made(
    params: Params, matrices: Choice, rank: float, key: Key, make: Callable[[Layout, Key, Array], Factors]
) -> dict[str, Factors]:  # fmt: skip
    return {
        leaf.name: make(leaf.layout, key_for(key, leaf.name), x)
        for leaf, x in zip(chosen_leaves(params, matrices, rank, "std"), jax.tree.leaves(params), strict=True)
        if leaf.layout
    }


def _random(how: Layout, key: Key, size: float | Array, zero: bool) -> Factors:
    """Factors whose product has standard deviation `size`; or, of LoRA, one of them zero."""
    m, n, r = how.rows, how.columns, how.rank
    keys = jax.random.split(key)
    down = jax.random.normal(keys[0], (*how.batch, m, r)) / m**0.5
    up = jax.random.normal(keys[1], (*how.batch, r, n)) * size * (m / r) ** 0.5
    return Factors(down, jnp.zeros_like(up) if zero else up)


def with_products(params: Params, factors: Mapping[str, Factors], matrices: Choice, scale: float = 1.0) -> Params:
    """The parameters plus scale * down @ up (of LoRA, alpha / r is the scale). The chosen ones get no gradient."""
    return _merged(params, factors, matrices, lambda x, product: jax.lax.stop_gradient(x) + scale * product)


def as_products(params: Params, factors: Mapping[str, Factors], matrices: Choice) -> Params:
    """The parameters with down @ up in place of the chosen ones, which are not read."""
    return _merged(params, factors, matrices, lambda x, product: product)


def _merged(
    params: Params, factors: Mapping[str, Factors], matrices: Choice, join: Callable[[Array, Array], Array]
) -> Params:  # fmt: skip
    leaves = chosen_leaves(params, matrices, 1, "std")  # of any rank: axes alone are read

    def one(leaf: Leaf, x: Array) -> Array:
        if leaf.layout is None:
            return x
        down, up = factors[leaf.name]
        return join(x, from_matrices(down @ up, leaf.layout.axes, leaf.layout.shape)).astype(x.dtype)

    treedef: Any = jax.tree.structure(params)
    return treedef.unflatten([one(leaf, x) for leaf, x in zip(leaves, jax.tree.leaves(params), strict=True)])
