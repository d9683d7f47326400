"""Sampling beside transformers' generate: `python -m benchmarks.decode [--model FOLDER]`.

The 12.2M-parameter Llama of benchmarks.train_step, prompts of 32 random tokens, 224 new ones drawn from the model's
distribution, batches of 8 and of 1; with --model also that model (a Hugging Face folder, such as one that `lmlab
convert` has made of SmolLM2-135M) in float32 and with bfloat16 weights. Every program is a process of its own; they
take turns. Prints a table, and as its last line one JSON object: tokens per second, and the ratios.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import arms, peers
from lmlab.core.errors import UserError, check

ARMS = ("lmlab", "transformers")
PROMPT, NEW = 32, 224
BATCHES = (8, 1)

Generate = Callable[[np.ndarray], Any]
"""`generate(prompts_BT)`: draws NEW tokens a row and returns when they are there."""


def ours(model: str, folder: str) -> Generate:
    """Lmlab's sampler. model: llama, float32 or bfloat16 (of the folder)."""
    from lmlab.core.runtime import prepare

    prepare(compile_cache=False)
    import jax

    from lmlab.inference.config import SamplingConfig
    from lmlab.inference.sample import sample
    from lmlab.models.config import AttentionConfig, MLPConfig, TransformerConfig
    from lmlab.models.transformer import transformer

    if model == "llama":
        config = TransformerConfig(
            vocab_size=peers.VOCAB, layers=peers.N_LAYERS, width=peers.WIDTH, max_length=PROMPT + NEW,
            norm_eps=peers.NORM_EPS, attention=AttentionConfig(heads=peers.N_HEADS), mlp=MLPConfig(width=peers.FFN),
        )  # fmt: skip
        lm = transformer(config)
        params = lm.init(jax.random.key(0))
    else:
        from lmlab.interop.pretrained import load_pretrained

        loaded = load_pretrained(Path(folder), dtype=model)
        lm, params = loaded.lm, loaded.params
    keys = iter(jax.random.split(jax.random.key(1), 10_000))
    settings = SamplingConfig(max_new_tokens=NEW)

    def generate(prompts_BT: np.ndarray) -> Any:
        drawn = sample(lm, params, list(prompts_BT), next(keys), settings)
        check(
            all(len(one.tokens) == NEW for one in drawn), "tokens drawn", [len(one.tokens) for one in drawn], str(NEW)
        )
        return drawn

    return generate


def theirs(model: str, folder: str) -> Generate:
    """Transformers' `generate` with its cache, as its documentation calls it for sampling."""
    from benchmarks.peers import torch_llama

    torch, transformers = torch_llama.import_torch()
    torch.set_num_threads(torch_llama.core_count())
    if model == "llama":
        torch.manual_seed(0)
        network = transformers.LlamaForCausalLM(torch_llama.llama_config(transformers))
    else:
        network = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, model))
    network = network.eval()

    def generate(prompts_BT: np.ndarray) -> Any:
        prompts = torch.from_numpy(prompts_BT).long()
        with torch.inference_mode():
            drawn = network.generate(
                prompts, attention_mask=torch.ones_like(prompts), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                max_new_tokens=NEW, min_new_tokens=NEW, pad_token_id=0, use_cache=True,
            )  # fmt: skip
        check(drawn.shape[1] == PROMPT + NEW, "tokens drawn", drawn.shape[1] - PROMPT, str(NEW))
        return drawn

    return generate


def work(arm: str, folder: str) -> Callable[[str], Sequence[float]]:
    """One program's process: for a line `model batch`, seconds of one call."""
    rng = np.random.default_rng(0)
    build = cache(lambda model: (ours if arm == "lmlab" else theirs)(model, folder))

    def answer(line: str) -> Sequence[float]:
        model, batch = line.split()
        generate = build(model)
        prompts_BT = rng.integers(0, peers.VOCAB, (int(batch), PROMPT)).astype(np.int32)
        began = time.perf_counter()
        generate(prompts_BT)
        return (time.perf_counter() - began,)

    return answer


def main(argv: list[str] | None = None) -> int:
    """Time both programs in turns."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="", help="a Hugging Face folder, besides the small Llama")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS, metavar="ARM")
    parser.add_argument("--rounds", type=int, default=7, help="timed calls of each program and case")
    parser.add_argument("--worker", choices=ARMS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        arms.serve(lambda: work(args.worker, args.model))
        return 0
    models = ["llama", *(["float32", "bfloat16"] if args.model else [])]
    workers = [arms.start("benchmarks.decode", name, ["--model", args.model]) for name in args.arms]
    seconds: dict[str, dict[str, list[float]]] = {}
    try:
        for case in (f"{model} {batch}" for model in models for batch in BATCHES):
            for worker in workers:
                worker.ask(case)  # compiles
            seconds[case] = {worker.name: [] for worker in workers}
            for _ in range(args.rounds):
                for worker in workers:
                    seconds[case][worker.name] += worker.ask(case)
    except UserError as error:
        print(f"decode: {error}", file=sys.stderr)
        return 2
    finally:
        for worker in workers:
            worker.process.kill()
    report(seconds)
    return 0


def report(seconds: dict[str, dict[str, list[float]]]) -> None:
    """The table, then the JSON line."""
    print(f"{os.cpu_count()} cores; {NEW} tokens after {PROMPT}; load {os.getloadavg()[0]:.1f} (the arms make some)")
    print(f"{'tok/s':14s} {'program':14s} {'median':>8s} {'quartiles':>15s} {'best':>7s}")
    summary: dict[str, float] = {}
    for case, by_arm in seconds.items():
        model, batch = case.split()
        tokens = int(batch) * NEW
        prefix = "" if model == "llama" else f"{model}_"
        for arm, times in by_arm.items():
            low, middle, high = statistics.quantiles(times, n=4) if len(times) > 1 else (times[0],) * 3
            spread = f"{tokens / high:.0f} to {tokens / low:.0f}"
            print(f"{case:14s} {arm:14s} {tokens / middle:8.0f} {spread:>15s} {tokens / min(times):7.0f}")
            summary[f"{prefix}{arm}_batch{batch}"] = round(tokens / middle)
        if set(by_arm) == set(ARMS):
            # Within a round both meet the same machine, so the median of ratios is steadier than a ratio of medians.
            ratios = [b / a for a, b in zip(by_arm["lmlab"], by_arm["transformers"], strict=True)]
            summary[f"{prefix}ratio_batch{batch}"] = round(statistics.median(ratios), 2)
    print(json.dumps(summary))


if __name__ == "__main__":
    sys.exit(main())
