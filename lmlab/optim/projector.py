"""Projectors of one parameter: made anew where they are due, stored, and applied."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lmlab.core.errors import check
from lmlab.core.rng import key_for
from lmlab.core.types import Array, Key
from lmlab.optim.matrices import Layout, from_matrices, to_matrices
from lmlab.optim.moments import Change
from lmlab.optim.quantised import INT4, Store, block_axis
from lmlab.optim.subspace import Refresh, renewed, tells


class Held(NamedTuple):
    """Projectors as they are stored, in the order of axes of the parameter; `optax.MaskedNode()` for none."""

    left: Any
    """Of the rows, matrices [m, r]."""
    right: Any
    """Of the columns, transposed: matrices [r, n]."""


class Bases(NamedTuple):
    """Projectors ready for use; None for none."""

    left: Array | None
    """[*batch, m, r] float32."""
    right: Array | None
    """[*batch, n, r] float32."""

    def down(self, G: Array) -> Array:
        """The projection of G [*batch, m, n]."""
        G = G if self.left is None else self.left.mT @ G
        return G if self.right is None else G @ self.right

    def back(self, N: Array) -> Array:
        """What is projected, as matrices [*batch, m, n]."""
        N = N if self.left is None else self.left @ N
        return N if self.right is None else N @ self.right.mT


def empty(layout: Layout, store: Store | None) -> Held:
    """Before the first renewal: zeros. Without a store nothing is held."""

    def zeros(wanted: bool, shape: tuple[int, ...]) -> Any:
        apart = store is not INT4 or block_axis(shape) not in layout.axes.batch
        check(apart or not wanted, "rank", layout.rank, "2 or more with projectors in 4 bits",
              "Blocks of numbers would run over several matrices.")  # fmt: skip
        return store.encode(jnp.zeros(shape, jnp.float32)) if wanted and store else optax.MaskedNode()

    return Held(zeros(layout.left, layout.left_shape), zeros(layout.right, layout.right_shape))


def bases(layout: Layout, held: Held, store: Store) -> Bases:
    """Read what is stored."""
    read = lambda stored, shape: to_matrices(store.decode(stored, shape), layout.axes)
    left = read(held.left, layout.left_shape) if layout.left else None
    right = read(held.right, layout.right_shape).mT if layout.right else None
    return Bases(left, right)


def drawn(layout: Layout, refresh: Refresh, key: Key) -> Bases:
    """Bases that depend on the key alone, so that nobody needs to store them. `refresh` is given no gradient."""

    def draw(wanted: bool, rows: int, key: Key) -> Array | None:
        one = lambda key: refresh(None, jnp.zeros((rows, layout.rank)), key)
        each = jax.vmap(one)(jax.random.split(key, layout.number)) if wanted else None
        return each if each is None else each.reshape(*layout.batch, rows, layout.rank)

    left = draw(layout.left, layout.rows, key_for(key, "left"))
    return Bases(left, draw(layout.right, layout.columns, key_for(key, "right")))


def renew(
    layout: Layout, gradient: Array, held: Held, due_N: Array, refresh: Refresh, store: Store, key: Key
) -> tuple[Held, Array]:  # fmt: skip
    """The projectors, those that are due made from the gradient; and [N] |cosine| of first columns with the old ones,
    -1 where the gradient is zero or not finite and says nothing.

    One matrix at a time, each in a branch of its own, so that no more than one of them is copied and decomposed at
    once, and nothing is done where nothing is due.
    """

    def made() -> tuple[Held, Array]:
        old, G = bases(layout, held, store), to_matrices(gradient, layout.axes)
        left, right = old
        cosine_N = jnp.ones(due_N.shape)
        if right is not None:
            right, cosine_N = _renewed(refresh, G.mT, right, due_N, key_for(key, "right"))
        if left is not None:
            left, cosine_N = _renewed(refresh, G, left, due_N, key_for(key, "left"))
        write = lambda P, shape: store.encode(from_matrices(P, layout.axes, shape))
        fresh = Held(
            held.left if left is None else write(left, layout.left_shape),
            held.right if right is None else write(right.mT, layout.right_shape),
        )
        # What is not due stays bit for bit, also if its store rounds.
        due = due_N.reshape(layout.count_shape)
        return jax.tree.map(lambda new, old: jnp.where(due, new, old), fresh, held), cosine_N

    return jax.lax.cond(jnp.any(due_N), made, lambda: (held, jnp.ones(due_N.shape)))


def _renewed(refresh: Refresh, G: Array, old: Array, due_N: Array, key: Key) -> tuple[Array, Array]:
    G_NMK, old_NMR = (x.reshape(-1, *x.shape[-2:]) for x in (G, old))

    def one(i: Array, P_NMR: Array) -> Array:
        before = jax.lax.dynamic_index_in_dim(old_NMR, i, keepdims=False)
        matrix = jax.lax.dynamic_index_in_dim(G_NMK, i, keepdims=False).astype(jnp.float32)
        turn = lambda: renewed(refresh, matrix, before, jax.random.fold_in(key, i))
        return jax.lax.dynamic_update_index_in_dim(P_NMR, jax.lax.cond(due_N[i], turn, lambda: before), i, 0)

    new_NMR = jax.lax.fori_loop(0, len(due_N), one, old_NMR)
    first = lambda x: x[:, :, 0]
    size = lambda x: jnp.sqrt(jnp.sum(x * x, axis=1))
    both = size(first(new_NMR)) * size(first(old_NMR))
    cosine_N = jnp.abs(jnp.sum(first(new_NMR) * first(old_NMR), axis=1)) / jnp.where(both > 0, both, 1)
    return new_NMR.reshape(old.shape), jnp.where(tells(jnp.max(jnp.abs(G_NMK), axis=(1, 2))), cosine_N, -1)


def change(layout: Layout, old: Bases, new: Bases, due_N: Array) -> Change:
    """What a renewal did to the coordinates."""
    overlap = lambda a, b: None if a is None or b is None else a.mT @ b
    with jax.default_matmul_precision("highest"):
        left, right = overlap(new.left, old.left), overlap(new.right, old.right)
    return Change(layout, due_N.reshape(layout.batch), left, right)
