"""Pairs per second and peak memory of DPO beside TRL's DPOTrainer: `python -m benchmarks.dpo`.

A Llama of 12.2M parameters (6 layers, width 384, 6 heads, ffn 1024, vocabulary 4096, tied), float32, AdamW, 8 pairs of
64 + 64 tokens a step. Every arm is a process of its own; they take turns, one step each. Peak memory is the largest
resident size of the whole process, libraries and compilation included.

lmlab shares the prompt of a pair, reads the reference's log-probabilities of all pairs before the first step, and
computes the layers a second time in the backward pass (`execution.remat`). `lmlab_beside` computes the reference in
every step, as one epoch over fresh pairs would cost in all; `lmlab_apart` gives each answer a prompt of its own;
`lmlab_kept` keeps all activations. TRL is timed with the reference in every step (its default) and all activations
kept (not its default, and faster); `trl_precomputed` without the reference; `trl_light` without it and with
activations computed again. All arms have to begin at the loss log 2.

Needs trl and datasets. The last line is JSON: speed_ratio and memory_ratio of lmlab over trl; and like against like,
speed_ratio_beside (reference in the step), speed_ratio_precomputed (without it), speed_ratio_light and
memory_ratio_light (without it, activations computed again by both), memory_ratio_kept (without it, kept by both).
"""

import argparse
import json
import math
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np

from benchmarks import arms, peers
from benchmarks.timing import median_ratio
from lmlab.core.errors import UserError, check

ARMS = ("lmlab", "lmlab_beside", "lmlab_apart", "lmlab_kept", "trl", "trl_precomputed", "trl_light")
WARM_UP = 3
"""Steps of each arm that are not counted."""
BETA = 0.1
PAIRS, TOKENS, KNOWN = 8, 64, 64
"""Pairs of a step; tokens of a prompt and of an answer; pairs of the data set."""

Triple = tuple[np.ndarray, np.ndarray, np.ndarray]


def make_pairs(seed: int) -> list[Triple]:
    """Random prompts and answers of `TOKENS` tokens; the last token of an answer is the vocabulary's last."""
    rng = np.random.default_rng(seed)
    draw = lambda: rng.integers(0, peers.VOCAB - 1, TOKENS).astype(np.int32)
    ended = lambda: np.append(draw()[:-1], np.int32(peers.VOCAB - 1))
    return [(draw(), ended(), ended()) for _ in range(KNOWN)]


def lmlab_step(arm: str, seed: int) -> Callable[[], tuple[float, float]]:
    """Seconds and loss of the next step of lmlab."""
    from lmlab.core.runtime import prepare

    prepare(compile_cache=False)
    import jax
    import jax.numpy as jnp

    from benchmarks.ours import llama, optimizer
    from lmlab.data.answers import lay_out_pairs, preferences_of
    from lmlab.data.preferences import EncodedPair
    from lmlab.models.config import ExecutionConfig
    from lmlab.objectives.dpo import REFERENCE, dpo
    from lmlab.objectives.pair_losses import sigmoid
    from lmlab.reference import with_reference
    from lmlab.train.state import new_state
    from lmlab.train.step import make_step

    kept = arm == "lmlab_kept"
    lm = llama(ExecutionConfig(unroll=0) if kept else ExecutionConfig(remat="full", unroll=1))
    tx = optimizer(lm)
    params = lm.init(jax.random.key(seed))
    pairs = [EncodedPair(str(i), prompt, answers, 1.0, 0.0) for i, (prompt, *answers) in enumerate(make_pairs(seed))]
    shared = arm != "lmlab_apart"
    rows = lay_out_pairs(pairs, (3 if shared else 4) * TOKENS, shared=shared)
    still: tuple[str, ...] = ()
    if arm == "lmlab_beside":
        params, still = {**params, REFERENCE: jax.tree.map(jnp.copy, params)}, (REFERENCE,)
    else:
        rows = with_reference(rows, lm, params, batch_size=PAIRS)
    step = jax.jit(make_step(dpo(lm, sigmoid, BETA), tx), donate_argnums=0)
    begin = jax.jit(lambda params, key: new_state(params, tx, key, still), donate_argnums=0)
    state, done = begin(params, jax.random.key(seed)), 0

    def answer() -> tuple[float, float]:
        nonlocal state, done
        began = time.perf_counter()
        numbers = [(done * PAIRS + i) % rows.rows for i in range(PAIRS)]
        state, metrics = jax.block_until_ready(step(state, preferences_of(rows, numbers, PAIRS)))
        done += 1
        return time.perf_counter() - began, float(metrics["loss"])

    return answer


def work(arm: str, seed: int) -> Callable[[str], tuple[float, float, float]]:
    """One arm's process: for every line, one step; its seconds, its loss and the peak of its memory so far in MB."""
    if arm.startswith("lmlab"):
        step = lmlab_step(arm, seed)
    else:
        from benchmarks.peers.trl_dpo import make_answer

        step = make_answer(
            seed, make_pairs(seed), BETA, PAIRS, precomputed=arm != "trl", checkpointed=arm == "trl_light"
        )
    return lambda _: (*step(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


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
    workers = []
    try:
        check(args.rounds >= 1, "--rounds", args.rounds, "at least 1")
        workers = [arms.start("benchmarks.dpo", arm, ["--seed", str(args.seed)]) for arm in args.arms]
        for worker in workers:
            losses = [worker.ask()[1] for _ in range(WARM_UP)]
            check(abs(losses[0] - math.log(2)) < 1e-3, worker.name, losses[0], "a first loss of log 2")
            print(f"{worker.name:16s} first losses {' '.join(f'{loss:.4f}' for loss in losses)}", flush=True)
        found: dict[str, list[list[float]]] = {worker.name: [] for worker in workers}
        for _ in range(args.rounds):
            for worker in workers:
                found[worker.name].append(worker.ask())
    except UserError as error:
        print(f"dpo: {error}", file=sys.stderr)
        return 2
    finally:
        for worker in workers:
            worker.process.kill()
    report({name: [row[0] for row in rows] for name, rows in found.items()},
           {name: rows[-1][2] for name, rows in found.items()})  # fmt: skip
    return 0


def report(seconds: dict[str, list[float]], peaks: dict[str, float]) -> None:
    """The table, then the JSON line."""
    print(f"\n{os.cpu_count()} cores\n{'':16s} {'pairs/s':>8s} {'quartiles':>15s} {'peak MB':>8s}")
    for arm, times in seconds.items():
        low, middle, high = statistics.quantiles(times, n=4) if len(times) > 1 else (times[0],) * 3
        spread = f"{PAIRS / high:.2f} to {PAIRS / low:.2f}"
        print(f"{arm:16s} {PAIRS / middle:8.2f} {spread:>15s} {peaks[arm]:8.0f}")
    compared = {
        "speed_ratio": ("lmlab", "trl"), "speed_ratio_beside": ("lmlab_beside", "trl"),
        "speed_ratio_precomputed": ("lmlab_kept", "trl_precomputed"), "speed_ratio_light": ("lmlab", "trl_light"),
    }  # fmt: skip
    result = {
        name: round(median_ratio(seconds[theirs], seconds[ours]), 2)
        for name, (ours, theirs) in compared.items()
        if ours in seconds and theirs in seconds
    }
    memory = {
        "memory_ratio": ("lmlab", "trl"), "memory_ratio_light": ("lmlab", "trl_light"),
        "memory_ratio_kept": ("lmlab_kept", "trl_precomputed"),
    }  # fmt: skip
    result |= {
        name: round(peaks[ours] / peaks[theirs], 2)
        for name, (ours, theirs) in memory.items()
        if ours in peaks and theirs in peaks
    }
    print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(main())
