"""Timing in turns: whatever else the machine does while a script runs then meets all that it compares alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax


def take_turns(arms: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every call by arm: one uncounted call each, then in every round one of each, in order.

    An arm may return arrays that are still being computed; a timing holds them whole.
    """
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds + 1):
        for name, run in arms.items():
            began = time.perf_counter()
            jax.block_until_ready(run())
            if number > 0:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def median_ratio(upper: list[float], lower: list[float]) -> float:
    """Median over the rounds of upper / lower: steadier than a ratio of medians, as a round meets one machine."""
    return statistics.median(a / b for a, b in zip(upper, lower, strict=True))


def relative_error(found: Any, wanted: Any) -> float:
    """The largest |found - wanted| / |wanted| of two alike pytrees of arrays, in Euclidean norms of whole leaves."""

    def error(a: jax.Array, b: jax.Array) -> jax.Array:
        a, b = a.astype("float32"), b.astype("float32")
        return jax.numpy.linalg.norm((a - b).ravel()) / jax.numpy.linalg.norm(b.ravel())

    # Unlike max(), this keeps a NaN.
    return float(jax.numpy.max(jax.numpy.stack(jax.tree.leaves(jax.tree.map(error, found, wanted)))))
