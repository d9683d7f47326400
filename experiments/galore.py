"""Projected gradients beside full ones and low-rank weights (arXiv 2403.03507): a control in closed form, a small LM.

    python -m experiments.galore [--smoke] [--out FOLDER]

The control: a matrix of full rank is learned from zero by gradients projected to rank 4. With one subspace for ever the
loss must end at what four singular values leave, and the rank of the weights at 4; with refreshes it falls to zero.
The LM: two layers of width 64 read program text by bytes; Adam at several rates, GaLore and its successors at rank 8, a
subspace that never changes, LoRA and factorised weights. Prints held-out loss, mean and standard deviation over seeds,
the rank of what was learned, and bytes of optimiser state; writes results.json, control.svg and losses.svg.
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from experiments.library_text import Text, read_text
from experiments.results import deviation, keep, say
from lmlab.cli import exit_code
from lmlab.core.errors import check
from lmlab.core.types import Array, Objective, Params
from lmlab.models.config import AttentionConfig, MLPConfig, TransformerConfig
from lmlab.models.transformer import transformer
from lmlab.objectives.next_token import next_token
from lmlab.optim.chain import build_schedule
from lmlab.optim.config import ScheduleConfig
from lmlab.optim.galore import galore, scale_by_galore
from lmlab.optim.groups import is_names, matrix_axes
from lmlab.optim.ldadam import scale_by_ldadam
from lmlab.optim.low_rank import as_products, lora_factors, random_factors, with_products
from lmlab.optim.matrices import by_axes, by_path, to_matrices
from lmlab.optim.moments import KEEP, RESET, ROTATE, Policy, subspace_adam
from lmlab.optim.quantised import INT4, SIGNED8, SQUARE8, stored_bytes
from lmlab.optim.residual import apollo, fira, frugal
from lmlab.optim.subspace import exact_svd, gaussian, random_orthonormal
from lmlab.optim.timing import lazy, staggered, together
from lmlab.report.plots import drawing
from lmlab.train.state import State, new_state
from lmlab.train.step import make_evaluation, make_step, ratio_value


@dataclass(frozen=True)
class Options:
    """Projected gradients in a control and in a small LM."""

    out: str = "runs/galore"
    """Where results.json and the figures go."""
    smoke: bool = False
    """A few steps of a few arms, to see that it runs."""
    seeds: int = 3
    """Trainings of each arm of the LM, on different rows from different parameters."""
    steps: int = 400
    """Steps of the LM."""
    rank: int = 8
    """Of its subspaces and factors."""
    every: int = 25
    """Its steps between two refreshes."""

    def __post_init__(self) -> None:
        """Check the sizes."""
        for name in ("seeds", "steps", "rank", "every"):
            check(getattr(self, name) >= 1, f"--{name}", getattr(self, name), "at least 1")


ROWS, COLUMNS, CONTROL_RANK, CONTROL_STEPS, CONTROL_RATE = 32, 48, 4, 600, 0.08
NEVER = 10**6
CONTROLS: dict[str, tuple[Policy, int, float, int]] = {
    "frozen": (KEEP, NEVER, 0.0, CONTROL_RANK),
    "T=100": (KEEP, 100, 0.0, CONTROL_RANK),
    "T=20": (KEEP, 20, 0.0, CONTROL_RANK),
    "T=1": (KEEP, 1, 0.0, CONTROL_RANK),
    "noise, frozen": (KEEP, NEVER, 0.3, CONTROL_RANK),
    "noise, T=100": (KEEP, 100, 0.3, CONTROL_RANK),
    "noise, T=20": (KEEP, 20, 0.3, CONTROL_RANK),
    "noise, T=20, rotate": (ROTATE, 20, 0.3, CONTROL_RANK),
    "noise, T=20, reset": (RESET, 20, 0.3, CONTROL_RANK),
    "noise, T=1": (KEEP, 1, 0.3, CONTROL_RANK),
    "noise, whole basis": (KEEP, NEVER, 0.3, ROWS),
}
"""Policy for moments, steps between refreshes, standard deviation of the noise of gradients, rank."""


def control(policy: Policy, every: int, noise: float, rank: int) -> dict[str, Any]:
    """Learn D from zero: the loss at the end over that at first, and the rank of what was learned.

    `predicted`: what the first `rank` singular values of D leave.
    """
    D = jax.random.normal(jax.random.key(0), (ROWS, COLUMNS)) / COLUMNS**0.5
    rate = optax.cosine_decay_schedule(CONTROL_RATE, CONTROL_STEPS, alpha=0.1)
    tx = galore(
        rate, by_path(), rank, refresh=exact_svd, timing=together(every), inner=subspace_adam(policy=policy)
    )  # fmt: skip

    def one(carry: Any, key: Array) -> tuple[Any, None]:
        W, state = carry
        updates, state = tx.update({"w": W - D + noise * jax.random.normal(key, D.shape)}, state)
        return (W + updates["w"], state), None

    start = jnp.zeros_like(D), tx.init({"w": D})
    keys = jax.random.split(jax.random.key(1), CONTROL_STEPS)
    (W, _), _ = jax.jit(lambda: jax.lax.scan(one, start, keys))()
    s = np.linalg.svd(D, compute_uv=False)
    learned = np.linalg.svd(W, compute_uv=False)
    return {
        "loss": float(jnp.sum((W - D) ** 2) / jnp.sum(D**2)),
        "rank": int(np.sum(learned > 1e-4 * learned[0])),
        "predicted": float(1 - np.sum(s[:rank] ** 2) / np.sum(s**2)),
    }


MODEL = TransformerConfig(
    vocab_size=257, layers=2, width=64, max_length=64, attention=AttentionConfig(heads=4), mlp=MLPConfig(width=256)
)
LM = transformer(MODEL)
BATCH, HELD_OUT = 16, 1024
"""Rows of a batch, and held-out rows."""


@dataclass(frozen=True)
class Arm:
    """A way to train the LM."""

    rule: optax.GradientTransformation
    peak: float = 1e-2
    """Highest learning rate."""
    factors: Callable[[Params, Array], Any] | None = None
    """`factors(params, key)`: factors that are trained in place of the matrices."""
    merge: Callable[[Params, Any], Params] | None = None


def arms(options: Options) -> dict[str, Arm]:
    """All ways, by name. Embedding and norms are Adam's everywhere."""
    choice, rank, every = by_axes(LM.axes), options.rank, options.every
    adam, when = optax.scale_by_adam(), together(every)
    # With factors, the matrices stand still and need no state.
    still = jax.tree.map(lambda names: matrix_axes(names) is not None, LM.axes, is_leaf=is_names)
    beside = optax.masked(adam, {"params": jax.tree.map(lambda is_still: not is_still, still), "factors": True})

    def projected(r: int = rank, **changes: Any) -> Arm:
        return Arm(scale_by_galore(choice, r, **{"timing": when, **changes}))

    found = {f"Adam, rate {rate:g}": Arm(adam, rate) for rate in (1e-3, 3e-3, 1e-2)} | {
        "GaLore": projected(),
        "GaLore, exact SVD": projected(refresh=exact_svd),
        "GaLore, rotate": projected(inner=subspace_adam(policy=ROTATE)),
        "GaLore, reset": projected(inner=subspace_adam(policy=RESET)),
        "GaLore, reverse_std": projected(side="reverse_std"),
        "GaLore, staggered": projected(timing=staggered(every)),
        "GaLore, 8 bits": projected(inner=subspace_adam(mu_store=SIGNED8, nu_store=SQUARE8)),
        "GaLore, frozen": projected(timing=together(NEVER)),
        "GoLore": projected(refresh=random_orthonormal),
        "Q-GaLore": projected(timing=lazy(every), store=INT4),
        "Fira": projected(lift=fira(0.25)),
        "FRUGAL": projected(lift=frugal(0.25, 0.05)),
        f"APOLLO, rank {MODEL.width // 4}": projected(MODEL.width // 4, refresh=gaussian, store=None, lift=apollo()),
        "APOLLO-Mini, rank 1": projected(1, refresh=gaussian, store=None, lift=apollo(128.0, per="tensor")),
        "LDAdam": Arm(scale_by_ldadam(choice, rank), 3e-3),
        "LoRA": Arm(
            beside, 3e-3, lambda params, key: lora_factors(params, choice, rank, key),
            lambda params, factors: with_products(params, factors, choice, scale=2.0),
        ),
        "factorised": Arm(
            beside, 3e-3, lambda params, key: random_factors(params, choice, rank, key),
            lambda params, factors: as_products(params, factors, choice),
        ),
    }  # fmt: skip
    kept = ("Adam, rate 0.003", "GaLore, rotate", "factorised")
    return {name: found[name] for name in kept} if options.smoke else found


def train(arm: Arm, text: Text, options: Options) -> dict[str, Any]:
    """Held-out loss of each seed, the rank of what its matrices learned, and bytes of optimiser state.

    Seeds are trained side by side. Counts of steps, and so the times of refreshes, are theirs together: with a count of
    each seed's own, both branches of a refresh would run at every step, as they do for Q-GaLore, whose times are each
    matrix's own: its cost here is not what it would be alone.
    """
    rate = build_schedule(ScheduleConfig(peak=arm.peak, warmup=0.1), options.steps)
    tx = optax.chain(arm.rule, optax.scale_by_learning_rate(rate))
    join, plainly = arm.merge, next_token(LM)
    merged = (lambda held: join(held["params"], held["factors"])) if join else (lambda held: held)
    objective: Objective = lambda held, batch, key: plainly(merged(held), batch, key)

    def begin(key: Array) -> State:
        params = LM.init(key)
        held = {"params": params, "factors": arm.factors(params, key)} if arm.factors else params
        return new_state(held, tx, jax.random.key(0))

    one = make_step(objective, tx)
    keys = jax.random.split(jax.random.key(2), options.seeds)
    axes = jax.tree.map(lambda x: 0 if x.ndim else None, jax.eval_shape(begin, keys[0]))
    states = jax.jit(jax.vmap(begin, out_axes=axes))(keys)
    first = jax.vmap(merged)(states.params)
    every = jax.vmap(lambda state, batch: one(state, batch)[0], (axes, 0), axes)
    advance = jax.jit(lambda states, rows: jax.lax.scan(lambda s, batch: (every(s, batch), None), states, rows)[0])
    count = math.gcd(options.steps, 50)
    for step in range(0, options.steps, count):
        states = advance(states, text.rows(step, count))
    last = jax.vmap(merged)(states.params)
    evaluation = make_evaluation(plainly)
    loss = lambda params: ratio_value(
        evaluation(params, text.held_out, jax.random.key(0)).losses["next_token"]
    )  # fmt: skip
    return {
        "losses": np.asarray(jax.jit(lambda all_: jax.lax.map(loss, all_))(last)).tolist(),
        "ranks": ranks(jax.tree.map(jnp.subtract, last, first)),
        "state_bytes": stored_bytes(jax.eval_shape(lambda key: begin(key).opt_state, keys[0])),
    }


def ranks(change: Params) -> dict[str, list[int]]:
    """The least and the largest rank of what the hidden matrices of all seeds learned, by parameter."""
    found = {}
    for (path, x), names in zip(
        jax.tree_util.tree_leaves_with_path(change),
        jax.tree.leaves(LM.axes, is_leaf=is_names), strict=True,
    ):  # fmt: skip
        axes = matrix_axes(names)
        if axes is not None:
            matrices = np.asarray(jax.vmap(lambda one, axes=axes: to_matrices(one, axes))(x))
            each = np.linalg.matrix_rank(matrices, rtol=1e-4)
            found[jax.tree_util.keystr(path, simple=True, separator="/")] = [int(each.min()), int(each.max())]
    return found


def run(options: Options) -> dict[str, Any]:
    """Both parts; all that is printed and drawn."""
    if options.smoke:
        options = replace(options, seeds=2, steps=4, every=2)
    chosen = {"frozen": CONTROLS["frozen"], "T=100": CONTROLS["T=100"]} if options.smoke else CONTROLS
    say("the control")
    controls = {name: control(*arguments) for name, arguments in chosen.items()}
    text, trained = read_text(options.seeds, BATCH, MODEL.max_length, 64 if options.smoke else HELD_OUT), {}
    for name, arm in arms(options).items():
        say(name)
        trained[name] = train(arm, text, options)
    return {"options": asdict(options), "control": controls, "arms": trained}


def table(result: dict[str, Any]) -> str:
    """What is printed."""
    lines = [f"{'control':28s} {'loss at the end':>16s} {'closed form':>12s} {'rank':>5s}"]
    for name, found in result["control"].items():
        # A basis that never changes, without noise: only then the end is known.
        known = f"{found['predicted']:12.4f}" if name == "frozen" else f"{'':12s}"
        lines.append(f"{name:28s} {found['loss']:16.4f} {known} {found['rank']:5d}")
    lines.append(
        f"\n{'held-out loss, nats a byte':28s} {'mean':>8s} {'±':>7s} {'state bytes':>12s} {'ranks learned':>14s}"
    )
    for name, found in result["arms"].items():
        low, high = (pick(pair[i] for pair in found["ranks"].values()) for i, pick in ((0, min), (1, max)))
        mean, spread = np.mean(found["losses"]), deviation(found["losses"])
        lines.append(f"{name:28s} {mean:8.4f} {spread:7.4f} {found['state_bytes']:12d} {f'{low} to {high}':>14s}")
    return "\n".join(lines)


def draw(result: dict[str, Any], folder: Path) -> None:
    """Bars of the control and of the LM."""
    controls = {name: ([found["loss"]], found["rank"]) for name, found in result["control"].items()}
    trained = {name: (found["losses"], found["state_bytes"]) for name, found in result["arms"].items()}
    for name, bars, label in (
        ("control.svg", controls, "loss at the end / at first (number: rank learned)"),
        ("losses.svg", trained, "held-out nats a byte (number: bytes of optimiser state)"),
    ):
        with drawing(folder / name, 8, 1 + 0.28 * len(bars)) as sheet:
            axes = sheet.subplots()
            means = [float(np.mean(values)) for values, _ in bars.values()]
            spread = [deviation(values) for values, _ in bars.values()]
            drawn = axes.barh(list(bars), means, xerr=spread, color="#0072B2")
            axes.bar_label(drawn, [f" {number:,}" for _, number in bars.values()], fontsize=7)
            axes.invert_yaxis()
            axes.set(xlabel=label, xlim=(0.97 * min(means) if name == "losses.svg" else 0, None))


def experiment(options: Options) -> int:
    """Run, write, print."""
    from lmlab.core.runtime import prepare

    prepare()
    result = run(options)
    draw(result, keep(result, options.out))
    print(table(result))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code, as `lmlab` does."""
    return exit_code(lambda: experiment(tyro.cli(Options, args=argv)), "python -m experiments.galore")


if __name__ == "__main__":
    sys.exit(main())
