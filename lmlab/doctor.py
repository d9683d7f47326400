"""What `lmlab doctor` tells of this machine."""

import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from lmlab.core.runtime import cache_folder
from lmlab.report.environment import describe_environment
from lmlab.train.device import peak_flops


def findings() -> Iterator[str]:
    """Lines: versions and devices, the cache, and the speed of a matmul in either type."""
    for name, value in describe_environment().items():
        yield f"{name:20s} {value}"
    yield f"{'cache':20s} {cache_folder()}"
    for dtype in ("float32", "bfloat16"):
        x = jnp.ones((1024, 1024), dtype)
        square = jax.jit(lambda x: x @ x)
        square(x).block_until_ready()
        start = time.perf_counter()
        for _ in range(10):
            y = square(x)
        y.block_until_ready()
        rate = 10 * 2 * 1024**3 / (time.perf_counter() - start)
        peak = peak_flops(dtype)
        known = f"of {peak / 1e12:.0f}" if peak else "(peak not known)"
        yield f"{dtype + ' matmul':20s} {rate / 1e12:.3f} TFLOP/s {known}"
