"""Tokens per second and MFU of a dense bfloat16 train step on one accelerator: `python -m benchmarks.gpu`.

Llamas of 124M, 350M and 1.3B parameters (vocabulary 50304, tied) under AdamW with float32 weights and 16-bit
activations, and beside them PyTorch: transformers' Llama, compiled, with flash attention (`peers/torch_cuda.py` says
what was chosen for it). Every arm is a process of its own and has the card alone, as both would not fit: one after
the other. Without --batch an arm starts with a batch of its size and halves it until it fits. Steps are timed in
blocks of five without a stop in between; the table shows the median block. MFU counts the flops of
`lmlab.models.flops` (causal attention once, recomputation not at all) against the dense peak of
`lmlab.train.device.CHIPS`, for both arms alike. The PyTorch arm is left out, and a line says so, where torch
with CUDA is not installed.

No GPU was at hand when this was written: no number has been read with it yet. `--toy` runs the same code at toy size
on a CPU, which is what the tests do. The last line is one JSON object.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import peers
from lmlab.core.errors import UserError, check
from lmlab.models.config import AttentionConfig, ExecutionConfig, MLPConfig, TransformerConfig
from lmlab.models.flops import training_flops_per_token

SHAPES = {
    "toy": peers.Shape(layers=2, width=64, heads=2, ffn=128, vocab=256),
    "124M": peers.Shape(layers=12, width=768, heads=12, ffn=2048, vocab=50304),
    "350M": peers.Shape(layers=24, width=1024, heads=16, ffn=2752, vocab=50304),
    "1.3B": peers.Shape(layers=24, width=2048, heads=16, ffn=5504, vocab=50304),
}
FIRST_TOKENS = {"toy": 128, "124M": 65536, "350M": 65536, "1.3B": 32768}
"""Tokens of the first batch that is tried on a device of 80 GB; more of them are no faster."""
WARM_UP, BLOCK = 3, 5
"""Steps that are not counted; steps of one timing."""


@dataclass(frozen=True)
class Job:
    """What one arm is to do."""

    arm: str
    size: str
    batch: int
    length: int
    steps: int
    remat: str
    unroll: int
    seed: int

    @property
    def config(self) -> TransformerConfig:
        """The model as lmlab's config."""
        shape = SHAPES[self.size]
        execution: Any = {"unroll": self.unroll, "remat": self.remat, "compute_dtype": "bfloat16"}
        return TransformerConfig(
            vocab_size=shape.vocab, layers=shape.layers, width=shape.width, max_length=self.length,
            norm_eps=peers.NORM_EPS, attention=AttentionConfig(heads=shape.heads), mlp=MLPConfig(width=shape.ffn),
            execution=ExecutionConfig(**execution),
        )  # fmt: skip


Steps = Callable[[np.ndarray, int], float]
"""`steps(tokens_BT, count) -> loss` makes `count` steps and waits for the last."""


def lmlab_steps(job: Job) -> tuple[Steps, dict[str, Any]]:
    """The train step of lmlab; and what is to be known of model and device."""
    from lmlab.core.runtime import prepare

    prepare()
    import jax

    from benchmarks.ours import make_update
    from lmlab.models.transformer import transformer
    from lmlab.train.device import peak_flops

    _need(job, jax.default_backend() != "cpu", "an accelerator that JAX sees")
    update = make_update(transformer(job.config), (job.batch, job.length + 1), job.seed)

    def steps(tokens_BT: np.ndarray, count: int) -> float:
        for _ in range(count):
            state, metrics = update(tokens_BT)
        # The loss alone may be ready before the weights are; a timing must hold the whole step.
        jax.block_until_ready((state, metrics))
        facts["parameters"] = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        return float(metrics["loss"])

    peak = peak_flops("bfloat16")
    facts: dict[str, Any] = {"device": jax.devices()[0].device_kind, "peak": peak and peak / jax.device_count()}
    return steps, facts


def torch_steps(job: Job) -> tuple[Steps, dict[str, Any]]:
    """The train step of the peer."""
    from benchmarks.peers import torch_cuda
    from benchmarks.peers.torch_llama import import_torch

    has_cuda = import_torch()[0].cuda.is_available()
    _need(job, has_cuda, "torch with CUDA")
    device = "cuda" if has_cuda else "cpu"
    steps, parameters = torch_cuda.make_steps(SHAPES[job.size], job.seed, device, "bfloat16", job.remat != "none")
    return steps, {"parameters": parameters}


def _need(job: Job, found: bool, what: str) -> None:
    check(found or job.size == "toy", "--size", job.size, what, "--toy runs on a CPU.")


def work(job: Job) -> dict[str, Any]:
    """Run one arm: seconds of a step by block, first and last loss, facts; or `absent`, or `out_of_memory`, and why."""
    tokens_BT = np.random.default_rng(job.seed).integers(0, SHAPES[job.size].vocab, (job.batch, job.length + 1))
    tokens_BT = tokens_BT.astype(np.int32)
    seconds = []
    try:
        steps, facts = (lmlab_steps if job.arm == "lmlab" else torch_steps)(job)
        first = steps(tokens_BT, 1)
        steps(tokens_BT, WARM_UP - 1)
        for _ in range(-(-job.steps // BLOCK)):
            began = time.perf_counter()
            last = steps(tokens_BT, BLOCK)
            seconds.append((time.perf_counter() - began) / BLOCK)
    except UserError as error:
        return {"absent": error.expected}
    except Exception as error:  # XLA and torch have no exception in common
        text = " ".join(str(error).split())
        if "RESOURCE_EXHAUSTED" not in text and "out of memory" not in text.lower():
            raise
        return {"out_of_memory": text[:200]}
    return {"batch": job.batch, "seconds": seconds, "losses": [first, last], **facts}


def start(job: Job) -> dict[str, Any]:
    """`work` in a process of its own; its messages go to standard error. Raises `UserError` where it dies."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--worker", json.dumps(asdict(job))]
    # torch takes all of the card that it needs; JAX reserves three quarters of it unless told otherwise.
    shares = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92", "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    environment = shares | os.environ | ({"JAX_PLATFORMS": "cpu"} if job.size == "toy" else {})
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise UserError("--size", job.size, f"an arm {job.arm} that runs here", "Its own message is above.")
    return json.loads(done.stdout.splitlines()[-1])


def fit(job: Job, halve: bool) -> dict[str, Any]:
    """The answer of one arm, at half the batch as often as memory asks for it."""
    answer = start(job)
    while halve and "out_of_memory" in answer and job.batch > 1:
        job = replace(job, batch=job.batch // 2)
        answer = start(job)
    return answer


def report(job: Job, answers: dict[str, dict[str, Any]]) -> dict[str, float | None]:
    """Print the rows of one size; its part of the JSON."""
    result: dict[str, float | None] = {}
    peak, device = answers["lmlab"].get("peak"), answers["lmlab"].get("device", "unknown device")
    print(f"{job.size:5s} {device}, peak {f'{peak / 1e12:.0f} TFLOP/s' if peak else 'unknown'}")
    flops = training_flops_per_token(job.config, job.length)
    for arm, answer in answers.items():
        if "seconds" not in answer:
            why = f"it needs {answer['absent']}" if "absent" in answer else f"out of memory: {answer['out_of_memory']}"
            print(f"{job.size:5s} {arm:14s} left out, {why}", flush=True)
            continue
        speed = answer["batch"] * job.length / statistics.median(answer["seconds"])
        mfu = flops * speed / peak if peak else None
        share = "unknown" if mfu is None else f"{100 * mfu:.1f}%"
        rows, (first, last) = f"{answer['batch']} x {job.length}", answer["losses"]
        print(f"{job.size:5s} {arm:14s} {answer['parameters']:14,d} {rows:>12s} {speed:10,.0f} {share:>8s}"
              f"   {first:.3f} to {last:.3f}", flush=True)  # fmt: skip
        result[arm] = round(speed)
        result["mfu" if arm == "lmlab" else f"{arm}_mfu"] = None if mfu is None else round(mfu, 4)
    return result


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The flags. Raises `UserError` where a number is out of range."""
    sizes = [size for size in SHAPES if size != "toy"]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", nargs="+", default=sizes, choices=sizes, metavar="SIZE")
    parser.add_argument("--batch", type=int, default=0, help="rows; 0: as many as fit, by halving")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=30, help=f"timed steps of each arm, in blocks of {BLOCK}")
    remat = "what lmlab recomputes; the peer checkpoints whole layers for both dots and full"
    parser.add_argument("--remat", choices=["none", "dots", "full"], default="none", help=remat)
    parser.add_argument("--unroll", type=int, default=0, help="layers per iteration of lmlab's scan; 0: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--toy", action="store_true", help="a toy size on a CPU, to see that the script runs")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.toy:
        args.size, args.length, args.steps = ["toy"], 32, BLOCK
    for name, least in (("batch", 0), ("length", 1), ("steps", 1), ("unroll", 0)):
        check(getattr(args, name) >= least, f"--{name}", getattr(args, name), f"{least} or more")
    return args


def main(argv: list[str] | None = None) -> int:
    """Measure every size."""
    try:
        args = parse(argv)
        if args.worker:
            answers, sys.stdout = sys.stdout, sys.stderr
            print(json.dumps(work(Job(**json.loads(args.worker)))), file=answers)
            return 0
        print(f"{'':20s} {'parameters':>14s} {'batch':>12s} {'tok/s':>10s} {'MFU':>8s}   loss on one batch", flush=True)
        result = {}
        for size in args.size:
            batch = args.batch or max(1, FIRST_TOKENS[size] // args.length)
            job = Job("lmlab", size, batch, args.length, args.steps, args.remat, args.unroll, args.seed)
            ours = fit(job, halve=not args.batch)
            check("absent" not in ours, "--size", size, ours.get("absent", ""), "--toy runs on a CPU.")
            peer = fit(replace(job, arm="torch_compile"), halve=not args.batch)
            result[size] = report(job, {"lmlab": ours, "torch_compile": peer})
        print(json.dumps(result))
    except UserError as error:
        print(f"gpu: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
