"""Tokens per second of lmlab's train step beside other programs': `python -m benchmarks.train_step`.

A Llama of 12.2M parameters (6 layers, width 384, 6 heads, ffn 1024, vocabulary 4096, tied), batch 8 x 256, float32,
AdamW. Every arm is a process of its own; they take turns, one step each, so that whatever else the machine does meets
all alike. Prints a table (median and quartiles), and as its last line one JSON object in tokens per second.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from importlib import import_module

import numpy as np

from benchmarks import arms, peers
from lmlab.core.errors import UserError

ARMS = ("lmlab", "torch_eager", "torch_compile", "nanodo_shape", "plain_jax")
WARM_UP = 3
"""Steps of each arm that are not counted: they compile, and touch memory for the first time."""


def make_step(arm: str, seed: int) -> peers.Step:
    """The step of one arm."""
    if arm.startswith("torch"):
        return import_module("benchmarks.peers.torch_llama").make_step(seed, arm == "torch_compile")
    if arm == "lmlab":
        return lmlab_step(seed)
    return import_module(f"benchmarks.peers.{arm}").make_step(seed)


def lmlab_step(seed: int) -> peers.Step:
    """The train step of lmlab itself, with the metrics and norms that every run gets."""
    from lmlab.core.runtime import prepare

    prepare(compile_cache=False)
    import jax

    from benchmarks.ours import llama, make_update
    from lmlab.models.config import ExecutionConfig

    update = make_update(llama(ExecutionConfig(unroll=0)), (peers.BATCH, peers.SEQ_LEN + 1), seed)

    def step(tokens_BT: np.ndarray) -> float:
        # The loss alone may be ready before the weights are; a timing must hold the whole step.
        _, metrics = jax.block_until_ready(update(tokens_BT))
        return float(metrics["loss"])

    return step


def work(arm: str, seed: int) -> Callable[[str], tuple[float, float]]:
    """One arm's process: for every line, one step; its seconds and its loss."""
    step = make_step(arm, seed)
    rng = np.random.default_rng(seed)

    def answer(_: str) -> tuple[float, float]:
        tokens_BT = rng.integers(0, peers.VOCAB, (peers.BATCH, peers.SEQ_LEN + 1)).astype(np.int32)
        began = time.perf_counter()
        loss = step(tokens_BT)
        return time.perf_counter() - began, loss

    return answer


def main(argv: list[str] | None = None) -> int:
    """Time all arms in turns."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS, metavar="ARM")
    parser.add_argument("--rounds", type=int, default=25, help="timed steps of each arm")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--worker", choices=ARMS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        arms.serve(lambda: work(args.worker, args.seed))
        return 0
    workers = [arms.start("benchmarks.train_step", arm, ["--seed", str(args.seed)]) for arm in args.arms]
    try:
        for worker in workers:
            losses = [worker.ask()[1] for _ in range(WARM_UP)]
            print(f"{worker.name:14s} first losses {' '.join(f'{loss:.4f}' for loss in losses)}", flush=True)
        times: dict[str, list[float]] = {worker.name: [] for worker in workers}
        load = os.getloadavg()[0]
        for _ in range(args.rounds):
            for worker in workers:
                times[worker.name].append(worker.ask()[0])
    except UserError as error:
        print(f"train_step: {error}", file=sys.stderr)
        return 2
    finally:
        for worker in workers:
            worker.process.kill()
    report(times, load)
    return 0


def report(times: dict[str, list[float]], load: float) -> None:
    """The table, then the JSON line."""
    tokens = peers.BATCH * peers.SEQ_LEN
    print(f"\n{os.cpu_count()} cores; load before the first timed step {load:.1f} (the arms themselves make some)")
    print(f"{'tok/s':14s} {'median':>8s} {'quartiles':>15s} {'best':>7s} {'of the first':>13s}")
    medians = {arm: tokens / statistics.median(seconds) for arm, seconds in times.items()}
    base = next(iter(times))
    for arm, seconds in times.items():
        low, _, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else (seconds[0],) * 3
        # Within a round the arms meet the same machine, so the median of ratios is steadier than a ratio of medians.
        ratio = statistics.median(ours / other for ours, other in zip(times[base], seconds, strict=True))
        spread = f"{tokens / high:.0f} to {tokens / low:.0f}"
        print(f"{arm:14s} {medians[arm]:8.0f} {spread:>15s} {tokens / min(seconds):7.0f} {ratio:12.2f}x")
    print(json.dumps({arm: round(value) for arm, value in medians.items()}))


if __name__ == "__main__":
    sys.exit(main())
