"""GaLore: any optax transform run on low-rank projections of gradients (arXiv 2403.03507), and its successors.

    galore(1e-2, by_axes(lm.axes), rank=128)                            # or by_axes(lm.axes, ("attention", "mlp"))
    scale_by_galore(by_axes(lm.axes), 128, lift=fira())                 # Fira, arXiv 2410.01623
    scale_by_galore(by_axes(lm.axes), 192, refresh=gaussian, lift=apollo(), store=None)   # APOLLO, arXiv 2412.05270
    scale_by_galore(by_axes(lm.axes), 128, refresh=random_orthonormal)  # GoLore, arXiv 2410.11289
    scale_by_galore(by_axes(lm.axes), 128, timing=lazy(200), store=INT4)  # Q-GaLore, arXiv 2407.08296

Each chosen matrix G [m, n] is projected to R = P^T G on an r-dimensional subspace of its shorter side, the inner
transform makes N of R, and the update is scale * P N. Whatever is not chosen goes through the inner transform as it is.

Under `optax.inject_hyperparams` all arguments but the learning rate are static: `static_args=STATIC`. Meshes have Auto
axes, as everywhere in lmlab: the branches of a refresh would have unlike types on Explicit ones.
"""

from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from lmlab.core.errors import UserError, check
from lmlab.core.rng import key_for
from lmlab.core.types import Array, Params
from lmlab.optim.matrices import Choice, Layout, Leaf, Side, chosen_leaves, from_matrices, to_matrices
from lmlab.optim.moments import Inner, Moving, as_inner, subspace_adam
from lmlab.optim.projector import Bases, Held, bases, change, drawn, empty, renew
from lmlab.optim.quantised import FLOAT32, Store
from lmlab.optim.residual import Lift, Projected, plain
from lmlab.optim.subspace import Refresh, subspace_iteration
from lmlab.optim.timing import Timing, together

STATIC = (
    "matrices", "rank", "refresh", "timing", "inner", "lift", "side", "store", "seed", "weight_decay", "mask",
)  # fmt: skip
"""Arguments of `galore` that can not be traced or scheduled."""


_REFRESH, _TIMING, _INNER, _LIFT = subspace_iteration(), together(200), subspace_adam(), plain(0.25)
"""What is done where nothing else is asked for."""


class GaloreState(NamedTuple):
    """State of `scale_by_galore`. Trees are alike the parameters, with `optax.MaskedNode()` where nothing is held."""

    step: Array
    """[] int32: updates made."""
    left: Any
    """Projectors of rows, matrices [m, r], in the order of axes of the parameter."""
    right: Any
    """Projectors of columns, transposed: matrices [r, n]."""
    inner: Any
    ages: Any
    """Updates since the last renewal of the basis; () unless the inner transform asks for them."""
    timing: Any
    lift: Any


def scale_by_galore(
    matrices: Choice, rank: float, *, refresh: Refresh = _REFRESH, timing: Timing = _TIMING,
    inner: Moving = _INNER, lift: Lift = _LIFT, side: Side = "std", store: Store | None = FLOAT32,
    seed: int | Array = 0,
) -> optax.GradientTransformationExtraArgs:  # fmt: skip
    """Run `inner` on projections of the chosen matrices.

    Args:
        matrices: which parameters are matrices (`by_axes`, `by_path`, `by_numbers`).
        rank: of the subspace, cut to the shorter side; below 1 a share of it.
        refresh: how a new basis is found. Bases of `gaussian` numbers are not orthonormal, as `ROTATE`, `fira` and
            `frugal` need them.
        timing: when.
        inner: an optax transform that needs no parameters, or `subspace_adam` with a policy for its moments.
        lift: how the full update is made, with the scale of the paper (alpha) in it.
        side: which side is projected.
        store: how projectors are held. None: not at all; they are drawn again at every step, so `refresh` must be
            `gaussian` or alike, all matrices are renewed `together`, and moments are kept.
        seed: of random bases; with the path of the parameter and the update it decides what is drawn.

    Raises `UserError` if nothing is chosen, or if `inner` asks for parameters.
    """
    check(0 < rank < 1 or (rank >= 1 and rank == int(rank)), "rank", rank, "a whole number, or a share below 1")
    check(side in get_args(Side), "side", side, " or ".join(get_args(Side)))
    check(store is not None or _needs_no_gradient(refresh), "refresh", refresh,
          "one that needs no gradient, such as gaussian, where projectors are drawn again")  # fmt: skip
    moving = as_inner(inner)
    check(store is not None or (timing.epoch is not None and moving.move is None), "store", None,
          "timing `together`, and moments that are kept, where projectors are drawn again")  # fmt: skip
    made = _Galore(matrices, rank, refresh, timing, moving, lift, side, store, seed)
    return optax.GradientTransformationExtraArgs(made.init, made.update)


def galore(
    learning_rate: optax.ScalarOrSchedule, matrices: Choice, rank: float, *, refresh: Refresh = _REFRESH,
    timing: Timing = _TIMING, inner: Moving = _INNER, lift: Lift = _LIFT, side: Side = "std",
    store: Store | None = FLOAT32, seed: int | Array = 0, weight_decay: float = 0.0, mask: Any = None,
) -> optax.GradientTransformationExtraArgs:  # fmt: skip
    """`scale_by_galore`, decoupled weight decay of the full parameters (not times the scale of GaLore), the rate.

    Decay acts on the parameters before the update, as optax has it; the authors' code lets it act after.
    """
    rule = scale_by_galore(
        matrices, rank, refresh=refresh, timing=timing, inner=inner, lift=lift, side=side, store=store, seed=seed
    )
    decay = optax.add_decayed_weights(weight_decay, mask) if weight_decay else optax.identity()
    return optax.chain(rule, decay, optax.scale_by_learning_rate(learning_rate))


def _needs_no_gradient(refresh: Refresh) -> bool:
    try:
        jax.eval_shape(lambda key: refresh(None, jnp.zeros((2, 1)), key), jax.random.key(0))
    except (AttributeError, TypeError):
        return False
    return True


class _Projection(NamedTuple):
    """A chosen parameter in one update."""

    layout: Layout
    due: Array
    old: Held
    held: Held
    bases: Bases
    timing: Any


class _Galore(NamedTuple):
    """The arguments of `scale_by_galore`."""

    matrices: Choice
    rank: float
    refresh: Refresh
    timing: Timing
    moving: Inner
    lift: Lift
    side: Side
    store: Store | None
    seed: int | Array

    def init(self, params: Params) -> GaloreState:
        """Zeros in the shapes that updates will have."""
        treedef: Any = jax.tree.structure(params)
        leaves = chosen_leaves(params, self.matrices, self.rank, self.side)
        chosen = lambda make: treedef.unflatten([make(x.layout) if x.layout else optax.MaskedNode() for x in leaves])
        low = [
            jnp.zeros(x.layout.low_shape, jnp.float32) if x.layout else leaf
            for x, leaf in zip(leaves, jax.tree.leaves(params), strict=True)
        ]
        ages = [jnp.zeros(x.layout.count_shape if x.layout else (), jnp.int32) for x in leaves]
        return GaloreState(
            step=jnp.zeros((), jnp.int32),
            left=chosen(lambda how: empty(how, self.store).left),
            right=chosen(lambda how: empty(how, self.store).right),
            inner=self.moving.init(treedef.unflatten(low)),
            ages=treedef.unflatten(ages) if self.moving.restarts else (),
            timing=chosen(lambda how: self.timing.init(how.number)),
            lift=chosen(lambda how: self.lift.init(how.batch)),
        )

    def update(
        self, updates: Any, state: GaloreState, params: Any = None, *, seen: Any = None, **extra_args: Any
    ) -> tuple[Any, GaloreState]:
        """As in optax; the parameters are not looked at. seen: what bases are made of in place of the updates."""
        del params
        treedef: Any = jax.tree.structure(updates)
        leaves = chosen_leaves(updates, self.matrices, self.rank, self.side)
        gradients = jax.tree.leaves(updates)
        parts, whole = treedef.flatten_up_to, treedef.unflatten
        total = sum(x.layout.number for x in leaves if x.layout)
        found = [
            self.projection(leaf, g, Held(left, right), timing, state.step, total) if leaf.layout else None
            for leaf, g, left, right, timing in zip(
                leaves,
                parts(updates if seen is None else seen),
                parts(state.left),
                parts(state.right),
                parts(state.timing),
                strict=True,
            )
        ]
        inner, ages = self.moved(state, found, treedef)
        low = [g if x is None else _down(x, g) for x, g in zip(found, gradients, strict=True)]
        aged = {"ages": ages} if self.moving.restarts else {}
        steps, inner = _run(self.moving, whole(low), inner, **aged, **extra_args)
        out, lifts = [], []
        for x, g, r, n, kept in zip(found, gradients, low, parts(steps), parts(state.lift), strict=True):
            new, kept = (n, kept) if x is None else _up(self.lift, x, g, r, n, kept)
            out.append(new.astype(g.dtype))
            lifts.append(kept)
        masked = optax.MaskedNode()
        return whole(out), GaloreState(
            step=optax.safe_increment(state.step),
            left=whole([x.held.left if x else masked for x in found]),
            right=whole([x.held.right if x else masked for x in found]),
            inner=inner,
            ages=jax.tree.map(lambda age: age + 1, ages),
            timing=whole([x.timing if x else masked for x in found]),
            lift=whole(lifts),
        )

    def projection(self, leaf: Leaf, g: Array, held: Held, timing: Any, now: Array, total: int) -> _Projection:
        """The bases of a parameter, those that are due made anew."""
        how = leaf.layout
        assert how is not None
        key = key_for(jax.random.key(self.seed), leaf.name)
        numbers_N = leaf.first + jnp.arange(how.number, dtype=jnp.int32)
        due_N = self.timing.due(timing, now, numbers_N, total)
        if self.store is None:
            assert self.timing.epoch is not None
            key = jax.random.fold_in(key, self.timing.epoch(now))
            return _Projection(how, due_N, held, held, drawn(how, self.refresh, key), timing)
        key = jax.random.fold_in(key, now)
        new, cosine_N = renew(how, g, held, due_N, self.refresh, self.store, key)
        timing = self.timing.learn(timing, now, due_N, cosine_N)
        return _Projection(how, due_N, held, new, bases(how, new, self.store), timing)

    def moved(self, state: GaloreState, found: list[_Projection | None], treedef: Any) -> tuple[Any, Any]:
        """The state of the inner transform and the ages, in the new bases."""
        ages = state.ages
        if self.moving.restarts:
            reset = lambda x, age: age if x is None else jnp.where(x.due.reshape(age.shape), 0, age)
            held = treedef.flatten_up_to(ages)
            ages = treedef.unflatten([reset(x, age) for x, age in zip(found, held, strict=True)])
        move, store = self.moving.move, self.store
        if move is None or store is None:
            return state.inner, ages

        def carried() -> Any:
            changes = [x and change(x.layout, bases(x.layout, x.old, store), x.bases, x.due) for x in found]
            return move(state.inner, treedef.unflatten(changes))

        some = jnp.any(jnp.concatenate([x.due for x in found if x is not None]))
        return jax.lax.cond(some, carried, lambda: state.inner), ages


def _down(x: _Projection, g: Array) -> Array:
    low = x.bases.down(to_matrices(g.astype(jnp.float32), x.layout.axes))
    return from_matrices(low, x.layout.axes, x.layout.low_shape)


def _up(lift: Lift, x: _Projection, g: Array, low: Array, step: Array, kept: Any) -> tuple[Array, Any]:
    axes = x.layout.axes
    gradient, low, step = (to_matrices(part.astype(jnp.float32), axes) for part in (g, low, step))
    new, kept = lift.update(Projected(gradient, low, step, x.bases.back, x.layout), kept)
    return from_matrices(new, axes, g.shape), kept


def _run(moving: Inner, low: Any, state: Any, **extra_args: Any) -> tuple[Any, Any]:
    """The inner transform, without parameters: those of the model have other shapes."""
    try:
        return moving.update(low, state, None, **extra_args)
    except ValueError as error:
        if "requires the current value of parameters" not in str(error):
            raise
        raise UserError("inner", "a transform that asks for parameters", "one that works on gradients alone",
                        "Chain weight decay, trust ratios and alike behind scale_by_galore; give one that only looks "
                        "at shapes by way of with_shapes_of_updates.") from None  # fmt: skip
