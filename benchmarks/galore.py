"""What projected gradients cost in time and save in bytes: `python -m benchmarks.galore`.

A Llama of 12 layers of width 768 (ffn 2048, vocabulary 32,000, layers stacked) steps on 2048 tokens, in turns with
AdamW and with GaLore of rank 256 between refreshes; then all its subspaces are renewed by each method, in turns,
from bases that are one refresh old. Overhead: (GaLore's step + a refresh / 200) / AdamW's step - 1. The distance of a
method is that of its subspaces from those of an exact SVD (the sine of the largest angle, arXiv 0909.4061), for
matrices whose singular value number 256 is four times the next one.

State bytes are counted from shapes and held against the elements that the formula gives. Prints tables, and as its last
line one JSON object. About three minutes on two quiet cores, 6 GB.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.timing import median_ratio, take_turns
from lmlab.cli import exit_code
from lmlab.core.types import Array, TokenBatch
from lmlab.models.config import AttentionConfig, MLPConfig, TransformerConfig
from lmlab.models.transformer import transformer
from lmlab.objectives.next_token import next_token
from lmlab.optim.galore import scale_by_galore
from lmlab.optim.matrices import by_axes, chosen_leaves
from lmlab.optim.moments import subspace_adam
from lmlab.optim.quantised import INT4, SIGNED8, SQUARE8, stored_bytes
from lmlab.optim.subspace import (
    Refresh,
    cholesky_qr,
    distance,
    exact_svd,
    gram,
    newton_schulz,
    randomised,
    renewed,
    subspace_iteration,
)
from lmlab.optim.timing import together
from lmlab.train.state import new_state
from lmlab.train.step import make_step

METHODS: dict[str, Refresh] = {
    "exact SVD": exact_svd,
    "gram and eigh": gram,
    "randomised": randomised(),
    "subspace": subspace_iteration(),
    "subspace, Cholesky": subspace_iteration(orthonormalise=cholesky_qr),
    "subspace, Newton-Schulz": subspace_iteration(orthonormalise=newton_schulz),
}
DEFAULT = "subspace"
EVERY = 200


def model(args: argparse.Namespace) -> Any:
    """The Llama."""
    return transformer(TransformerConfig(
        vocab_size=args.vocab, layers=args.layers, width=args.width, max_length=256, tied=False,
        attention=AttentionConfig(heads=args.width // 64), mlp=MLPConfig(width=args.ffn),
    ))  # fmt: skip


def state_table(lm: Any, rank: int) -> tuple[list[tuple[str, int]], bool]:
    """Bytes of optimiser state by rule, and whether GaLore's elements are those of the formula."""
    params = jax.eval_shape(lm.init, jax.random.key(0))
    choice = by_axes(lm.axes)
    coded = subspace_adam(mu_store=SIGNED8, nu_store=SQUARE8)
    rules = {
        "Adam": optax.scale_by_adam(),
        "GaLore": scale_by_galore(choice, rank),
        "GaLore, reverse_std": scale_by_galore(choice, rank, side="reverse_std"),
        "GaLore, 8-bit moments": scale_by_galore(choice, rank, inner=coded),
        "GaLore, 8-bit moments, 4-bit bases": scale_by_galore(choice, rank, inner=coded, store=INT4),
    }
    states = {name: jax.eval_shape(tx.init, params) for name, tx in rules.items()}

    def formula(leaf: Any, x: Any, longer: bool) -> int:
        if leaf.layout is None:
            return 2 * x.size
        small, large = sorted((leaf.layout.rows, leaf.layout.columns))
        return leaf.layout.number * leaf.layout.rank * (large + 2 * small if longer else small + 2 * large)

    exact = True
    for name, longer in (("GaLore", False), ("GaLore, reverse_std", True)):
        leaves = zip(chosen_leaves(params, choice, rank, "std"), jax.tree.leaves(params), strict=True)
        floats = sum(x.size for x in jax.tree.leaves(states[name]) if x.dtype == jnp.float32)
        exact &= floats == sum(formula(leaf, x, longer) for leaf, x in leaves)
    return [(name, stored_bytes(state)) for name, state in states.items()], exact


def stepper(lm: Any, tx: optax.GradientTransformation, batch: TokenBatch) -> Callable[[], Any]:
    """One step at each call; the first one, which refreshes, is made here."""
    step = jax.jit(make_step(next_token(lm, chunk=512), tx), donate_argnums=0)
    held = [jax.jit(lambda key: new_state(lm.init(key), tx, key))(jax.random.key(0))]

    def one() -> Any:
        held[0], metrics = step(held[0], batch)
        return metrics

    one()
    return one


def with_gap(key: Array, rows: int, columns: int, rank: int) -> Array:
    """A matrix [m, n] whose singular value number `rank` is four times the next one."""
    keys = jax.random.split(key, 3)
    basis = lambda key, size: jnp.linalg.qr(jax.random.normal(key, (size, rank)))[0]
    large = (basis(keys[0], rows) * jnp.linspace(4, 1, rank)[None]) @ basis(keys[1], columns).T
    noise = jax.random.normal(keys[2], (rows, columns))
    return large + noise / (4 * (math.sqrt(rows) + math.sqrt(columns)))


def refreshes(lm: Any, rank: int, rounds: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of a refresh of all matrices by method, and the largest distance from the exact subspaces."""
    params = jax.eval_shape(lm.init, jax.random.key(0))
    layouts = [leaf.layout for leaf in chosen_leaves(params, by_axes(lm.axes), rank, "std") if leaf.layout]
    # [m, n], the projected side first, and how many there are.
    shapes: dict[tuple[int, int], int] = {}
    for how in layouts:
        shape = (min(how.rows, how.columns), max(how.rows, how.columns))
        shapes[shape] = shapes.get(shape, 0) + how.number
    before = {shape: with_gap(jax.random.key(0), *shape, rank) for shape in shapes}
    after = {
        shape: G + 0.05 * jax.random.normal(jax.random.key(5), G.shape) / math.sqrt(G.shape[1])
        for shape, G in before.items()
    }
    old = {shape: jax.jit(partial(renewed, exact_svd))(G, jnp.zeros((shape[0], rank)), jax.random.key(0))
           for shape, G in before.items()}  # fmt: skip
    calls: dict[str, Any] = {}
    for name, refresh in METHODS.items():
        one = jax.jit(partial(renewed, refresh))
        # All results are waited for, not the last ones alone.
        calls[name] = lambda one=one: {
            shape: [one(after[shape], old[shape], jax.random.key(1)) for _ in range(count)]
            for shape, count in shapes.items()
        }
    found = {name: {shape: bases[-1] for shape, bases in call().items()} for name, call in calls.items()}
    seconds = take_turns(calls, rounds)
    apart = {
        name: max(float(distance(found[name][shape], found["exact SVD"][shape])) for shape in shapes) for name in calls
    }
    return seconds, apart


def main(argv: list[str] | None = None) -> int:
    """Count, time, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, default in (("layers", 12), ("width", 768), ("ffn", 2048), ("vocab", 32_000), ("rank", 256),
                          ("rows", 8), ("rounds", 5)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args(argv)
    lm = model(args)
    rows, exact = state_table(lm, args.rank)
    for name, size in rows:
        print(f"{name:36s} {size / 1e6:9.1f} MB of state  {size / rows[0][1]:6.3f} of Adam's")

    tokens = jnp.asarray(np.random.default_rng(0).integers(0, args.vocab, (args.rows, 257)), jnp.int32)
    ones = jnp.ones_like(tokens)
    batch = TokenBatch(tokens, ones, jnp.cumsum(ones, axis=1) - 1, ones > 0)
    rules = {
        "AdamW": optax.adamw(1e-3),
        "GaLore": optax.chain(
            scale_by_galore(by_axes(lm.axes), args.rank, timing=together(10**6)), optax.scale_by_learning_rate(1e-3)
        ),
    }
    steps = take_turns({name: stepper(lm, tx, batch) for name, tx in rules.items()}, args.rounds)
    plainly = median_ratio(steps["GaLore"], steps["AdamW"]) - 1
    seconds, apart = refreshes(lm, args.rank, max(args.rounds // 2, 1))
    exact_seconds, base = statistics.median(seconds["exact SVD"]), statistics.median(steps["AdamW"])
    print(
        f"\n{'refresh of all subspaces':36s} {'seconds':>9s} {'SVD / it':>9s} {'a step, T=200':>14s} {'distance':>9s}"
    )
    for name, times in seconds.items():
        median = statistics.median(times)
        share = median / EVERY / base
        print(f"{name:36s} {median:9.3f} {exact_seconds / median:9.1f} {share:14.2%} {apart[name]:9.1e}")
    refresh = statistics.median(seconds[DEFAULT])
    print(f"\nstep of AdamW {base:.3f} s; of GaLore between refreshes {plainly:+.2%}")
    print(json.dumps({
        "overhead_T200": round(plainly + refresh / EVERY / base, 4), "overhead_between": round(plainly, 4),
        "state_bytes_exact": exact, "svd_over_refresh": round(exact_seconds / refresh, 1),
        "distance": float(f"{apart[DEFAULT]:.1e}"), "seconds_step": round(base, 3),
        "seconds_refresh": round(refresh, 3),
    }))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main, "python -m benchmarks.galore"))
