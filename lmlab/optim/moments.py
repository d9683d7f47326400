"""Adam in a moving subspace: what becomes of its moments when the basis changes, and how they are stored."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from lmlab.core.types import Array
from lmlab.optim.matrices import Layout, from_matrices, to_matrices
from lmlab.optim.quantised import FLOAT32, Store


class Change(NamedTuple):
    """New bases of the matrices of a parameter."""

    layout: Layout
    renewed: Array
    """[*batch] bool: which of them; the others have their old ones."""
    left: Array | None
    """[*batch, r, r]: new basis, transposed, times old one, of the rows; None if they are not projected."""
    right: Array | None
    """The same of the columns."""


class Inner(NamedTuple):
    """A transform that works on projected gradients; one whose moments move is no part of an `optax.chain`."""

    init: Callable[[Any], Any]
    update: Callable[..., tuple[Any, Any]]
    """As in optax. If `restarts`, it is given `ages`: updates since the last renewal, alike the updates."""
    move: Callable[[Any, Any], Any] | None = None
    """`move(state, changes) -> state`: a tree alike the updates of `Change` (None: no matrix). None: all is kept."""
    restarts: bool = False


def as_inner(tx: optax.GradientTransformation | Inner) -> Inner:
    """An optax transform whose state knows nothing of bases; it is kept as it is when they change."""
    return tx if isinstance(tx, Inner) else Inner(tx.init, optax.with_extra_args_support(tx).update)


def with_shapes_of_updates(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """For a transform that asks for parameters to learn their shapes, which projected gradients do not have."""
    return optax.GradientTransformation(tx.init, lambda updates, state, params=None: tx.update(updates, state, updates))


class Policy(NamedTuple):
    """What becomes of the two moments of Adam when the basis changes."""

    move: Callable[..., tuple[Array, Array]] | None
    """`move(m, v, change, decayed) -> (m, v)`; decayed: (1 - b1^t, 1 - b2^t)."""
    restarts: bool = False


def _reset(m: Array, v: Array, change: Change, decayed: tuple[Array, Array]) -> tuple[Array, Array]:
    del decayed
    renewed = change.renewed.reshape(change.layout.count_shape)
    return jnp.where(renewed, 0, m), jnp.where(renewed, 0, v)


def _rotate(m: Array, v: Array, change: Change, decayed: tuple[Array, Array]) -> tuple[Array, Array]:
    axes, shape = change.layout.axes, m.shape
    started = [jnp.where(part > 0, part, 1) for part in decayed]
    mean, square = to_matrices(m, axes) / started[0], to_matrices(v, axes) / started[1]
    if change.left is not None:
        mean, square = rotate_moments(mean, square, change.left)
    if change.right is not None:
        mean, square = (x.mT for x in rotate_moments(mean.mT, square.mT, change.right))
    renewed = change.renewed.reshape(change.layout.count_shape)
    back = lambda x, part, old: jnp.where(renewed, from_matrices(part * x, axes, shape), old)
    return back(mean, started[0], m), back(square, started[1], v)


def rotate_moments(mean: Array, square: Array, C: Array) -> tuple[Array, Array]:
    """Mean and mean square [..., r, n] of coordinates in a new basis.

    C: [..., r, r], the new basis, transposed, times the old one. As if the old coordinates varied independently of
    each other (arXiv 2410.16103, section 3.1).
    """
    with jax.default_matmul_precision("highest"):
        turned = C @ mean
        return turned, jnp.abs((C * C) @ (square - mean * mean) + turned * turned)


KEEP = Policy(None)
"""As if the coordinates meant the same (arXiv 2403.03507 and its code)."""
RESET = Policy(_reset, restarts=True)
"""From zero, and with the bias correction of the first step."""
ROTATE = Policy(_rotate)
"""Turned into the new basis (LDAdam, arXiv 2410.16103); both bases must be orthonormal."""


def subspace_adam(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, *, policy: Policy = KEEP,
    mu_store: Store = FLOAT32, nu_store: Store = FLOAT32,
) -> Inner:  # fmt: skip
    """`optax.scale_by_adam` with float32 arithmetic, moments stored in any way, and a policy for new bases.

    bfloat16 is no store for second moments: with b2 = 0.999 their increments vanish in its 8 bits.
    """

    def init(params: Any) -> optax.ScaleByAdamState:
        zeros = lambda store: jax.tree.map(lambda x: store.encode(jnp.zeros(x.shape, jnp.float32)), params)
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), zeros(mu_store), zeros(nu_store))

    def update(
        updates: Any, state: optax.ScaleByAdamState, params: Any = None, *, ages: Any = None, **extra_args: Any
    ) -> tuple[Any, optax.ScaleByAdamState]:
        del params, extra_args
        count, treedef = optax.safe_increment(state.count), _structure(updates)
        parts, whole = treedef.flatten_up_to, treedef.unflatten
        gradients = [g.astype(jnp.float32) for g in jax.tree.leaves(updates)]
        read = lambda store, held: [store.decode(x, g.shape) for x, g in zip(parts(held), gradients, strict=True)]
        # Optax's own functions on whole trees, so that what is no matrix gets its steps to the bit.
        mus = optax.tree.update_moment(gradients, read(mu_store, state.mu), b1, 1)
        nus = optax.tree.update_moment_per_elem_norm(gradients, read(nu_store, state.nu), b2, 2)
        if policy.restarts:
            correct = lambda moments, decay: [
                optax.tree.bias_correction(x, decay, age + 1) for x, age in zip(moments, parts(ages), strict=True)
            ]
        else:
            correct = lambda moments, decay: optax.tree.bias_correction(moments, decay, count)
        steps = [m / (jnp.sqrt(v) + eps) for m, v in zip(correct(mus, b1), correct(nus, b2), strict=True)]
        mu, nu = map(mu_store.encode, mus), map(nu_store.encode, nus)
        return whole(steps), optax.ScaleByAdamState(count, whole(mu), whole(nu))

    move = policy.move and _mover(policy.move, b1, b2, mu_store, nu_store)
    return Inner(init, update, move, policy.restarts)


def _mover(
    turn: Callable[..., tuple[Array, Array]], b1: float, b2: float, mu_store: Store, nu_store: Store
) -> Callable[[optax.ScaleByAdamState, Any], optax.ScaleByAdamState]:  # fmt: skip
    """`Inner.move` of a policy on stored moments."""

    def one(change: Change, mu: Any, nu: Any, decayed: tuple[Array, Array]) -> tuple[Any, Any]:
        """In a branch: most parameters have no new basis when refreshes are staggered."""
        shape = change.layout.low_shape

        def turned() -> tuple[Any, Any]:
            m, v = turn(mu_store.decode(mu, shape), nu_store.decode(nu, shape), change, decayed)
            return mu_store.encode(m), nu_store.encode(v)

        return jax.lax.cond(jnp.any(change.renewed), turned, lambda: (mu, nu))

    def move(state: optax.ScaleByAdamState, changes: Any) -> optax.ScaleByAdamState:
        is_leaf = lambda leaf: leaf is None or isinstance(leaf, Change)
        treedef, mus, nus = _structure(changes, is_leaf), [], []
        decayed = 1 - b1**state.count, 1 - b2**state.count
        given = jax.tree.leaves(changes, is_leaf=is_leaf)
        for change, mu, nu in zip(given, treedef.flatten_up_to(state.mu), treedef.flatten_up_to(state.nu), strict=True):
            if change is not None:
                mu, nu = one(change, mu, nu, decayed)
            mus.append(mu)
            nus.append(nu)
        return optax.ScaleByAdamState(state.count, treedef.unflatten(mus), treedef.unflatten(nus))

    return move


def _structure(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> Any:
    return jax.tree.structure(tree, is_leaf=is_leaf)


Moving: TypeAlias = optax.GradientTransformation | Inner
"""What projected gradients may be given to."""
