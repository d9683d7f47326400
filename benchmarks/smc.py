"""SMC steering beside llamppl: `python -m benchmarks.smc`.

A Llama of 6 layers, width 384 and GPT-2's number of tokens, written as a Hugging Face folder that both read; a prompt
of 20 tokens, 24 tokens a particle, half of the vocabulary allowed at every step (observed, then drawn from). Standard
SMC with 16 and 64 particles, and steering with 16 particles of 3 children. Every program is a process of its own; they
take turns. llamppl batches all particles and keeps the prompt, as its documentation advises.

Memory a particle: how much the largest resident size of a process grows from 16 to 64 particles, divided by 48; ours
holds the compiler's memory for another program, too, so that what a particle keeps (cache, logits) is counted as well.
resample_fraction: time of choosing particles and moving their caches, alone and at every step, over the time of a step;
the larger one of both methods, at 64 particles.

Needs llamppl and transformers for their arm. Prints a table, and as its last line one JSON object.
"""

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import arms, peers
from benchmarks.timing import median_ratio, take_turns
from lmlab.core.errors import UserError, check

ARMS = ("lmlab", "llamppl")
VOCAB, PROMPT, NEW, CHILDREN = 50257, 20, 24, 3
CASES = (("standard", 16), ("standard", 64), ("steer", 16))

Answer = Callable[[str, int, int], float]
"""`answer(method, particles, children)`: seconds of one run, prompt included."""


def draw_case(seed: int) -> tuple[list[int], np.ndarray]:
    """A prompt, and the tokens that are allowed; the last token ends a text and is not."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, VOCAB - 1, PROMPT).tolist(), (rng.random(VOCAB) < 0.5) & (np.arange(VOCAB) < VOCAB - 1)


def build_lm() -> tuple[Any, Any, Any]:
    """Config, LM and parameters, the same in every process."""
    import jax

    from lmlab.models.config import AttentionConfig, MLPConfig, TransformerConfig
    from lmlab.models.transformer import transformer

    config = TransformerConfig(
        vocab_size=VOCAB, layers=peers.N_LAYERS, width=peers.WIDTH, max_length=256, norm_eps=peers.NORM_EPS,
        attention=AttentionConfig(heads=peers.N_HEADS), mlp=MLPConfig(width=peers.FFN),
    )  # fmt: skip
    lm = transformer(config)
    return config, lm, lm.init(jax.random.key(0))


def write_model(folder: Path) -> None:
    """The model as a Hugging Face folder, with a tokenizer of bytes, pairs of bytes and an end."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    from lmlab.data.tokenizers import END_TOKENS, wrap_tokenizer
    from lmlab.interop.huggingface import save_pretrained
    from lmlab.interop.tokenizer_files import TokenizerFiles

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(a, b) for a in letters for b in letters][: VOCAB - 1 - len(letters)]
    words = [*letters, *(a + b for a, b in merges), END_TOKENS[0]]
    model = tokenizers.Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    model.pre_tokenizer, model.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    text = TokenizerFiles(wrap_tokenizer(model, END_TOKENS[0]), None, None)
    config, _, params = build_lm()
    save_pretrained(folder, config, params, text)


def our_runs(seed: int) -> tuple[Answer, Callable[[], Sequence[float]]]:
    """Lmlab's runs, and what `resampling_share` finds."""
    from lmlab.core.runtime import prepare

    prepare(compile_cache=False)
    import jax
    import jax.numpy as jnp

    from lmlab.inference.programs import Particle, Program
    from lmlab.inference.smc import standard, steering
    from lmlab.inference.texts import infer

    def step(p: Particle, state: Any) -> Any:
        p.observe(p.context.mask(p.tables), True)
        p.sample(p.context.next_token())
        return state

    prompt, allowed_V = draw_case(seed)
    _, lm, params = build_lm()
    program = Program(step, tables=jnp.asarray(allowed_V))
    keys = iter(jax.random.split(jax.random.key(1), 100_000))
    driver = lambda method, children: steering(children) if method == "steer" else standard()

    def run(method: str, particles: int, children: int) -> Any:
        tokens = np.asarray(prompt, np.int32)
        *_, found = infer(
            lm, params, program, [tokens], next(keys), driver(method, children), particles=particles, tokens=NEW
        )  # fmt: skip
        return jax.block_until_ready(found)

    def answer(method: str, particles: int, children: int) -> float:
        began = time.perf_counter()
        found = run(method, particles, children)
        seconds = time.perf_counter() - began
        check(int(found.rounds) == NEW, "rounds", int(found.rounds), str(NEW))
        return seconds

    return answer, partial(resampling_share, run, lm.for_decoding(params)[0], program, 64)


def resampling_share(run: Callable[..., Any], lm: Any, program: Any, particles: int) -> tuple[float, float]:
    """Seconds of choosing and moving alone over those of whole runs, the larger one of both methods; and the megabytes
    that a particle keeps.
    """
    import jax

    from lmlab.inference.resampling import resampled, stratified
    from lmlab.inference.smc import Driver, choose, steering
    from lmlab.inference.texts import inherit

    always = Driver(1, lambda key, log_weight_C, count: resampled(stratified, key, log_weight_C))
    shares = []
    for method, driver in (("standard", always), ("steer", steering(CHILDREN))):
        found = run(method, particles, CHILDREN)

        def alone(state: Any, weights_TPK: Any, driver: Driver = driver) -> Any:
            def body(i: Any, state: Any) -> Any:
                chosen = choose(driver, jax.random.key(i), weights_TPK[i])
                return inherit(lm, program.contexts, state, chosen.index_N // driver.children)

            return jax.lax.fori_loop(0, NEW, body, state)

        compiled, last = jax.jit(alone, donate_argnums=0), [found.state]

        def again(
            compiled: Any = compiled, last: list[Any] = last, weights: Any = found.history.child_weight_TPK
        ) -> Any:
            last[0] = compiled(last[0], weights)
            return last[0]

        seconds = take_turns({"whole": partial(run, method, particles, CHILDREN), "alone": again}, 5)
        shares.append(median_ratio(seconds["alone"], seconds["whole"]))
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(last[0])) / particles / 1e6
    return max(shares), kept


def work(arm: str, folder: str, seed: int) -> Callable[[str], Sequence[float]]:
    """One program's process: for a line `method particles`, seconds of one run and megabytes of the process at most;
    for `resampling`, what `resampling_share` finds.
    """
    if arm == "lmlab":
        answer, share = our_runs(seed)
    else:
        from benchmarks.peers.llamppl_smc import make_answer

        answer = make_answer(folder, *draw_case(seed), NEW)

    def reply(line: str) -> Sequence[float]:
        if line == "resampling":
            return share()
        method, particles = line.split()
        seconds = answer(method, int(particles), CHILDREN)
        return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    return reply


def main(argv: list[str] | None = None) -> int:
    """Time both programs in turns."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS, metavar="ARM")
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of each program and case")
    parser.add_argument("--seed", type=int, default=0, help="of the prompt and of what is allowed")
    parser.add_argument("--worker", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", default="", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        arms.serve(lambda: work(args.worker, args.folder, args.seed))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        try:
            check(args.rounds >= 1, "--rounds", args.rounds, "at least 1")
            write_model(Path(folder))
            found, ours = compare(args.arms, folder, args.rounds, args.seed)
        except UserError as error:
            print(f"smc: {error}", file=sys.stderr)
            return 2
    report(found, ours)
    return 0


Found = dict[tuple[str, int], dict[str, list[list[float]]]]
"""By case and arm, seconds and megabytes of every run."""


def compare(names: Sequence[str], folder: str, rounds: int, seed: int) -> tuple[Found, list[float]]:
    """All runs; of our arm also the share of resampling, and the megabytes that a particle keeps."""
    options = ["--folder", folder, "--seed", str(seed)]
    workers = [arms.start("benchmarks.smc", name, options) for name in names]
    found: Found = {}
    try:
        for case in CASES:
            line = f"{case[0]} {case[1]}"
            for worker in workers:
                worker.ask(line)  # compiles
            found[case] = {worker.name: [] for worker in workers}
            for _ in range(rounds):
                for worker in workers:
                    found[case][worker.name].append(worker.ask(line))
        ours = [number for worker in workers if worker.name == "lmlab" for number in worker.ask("resampling")]
    finally:
        for worker in workers:
            worker.process.kill()
    return found, ours


def report(found: Found, ours: Sequence[float]) -> None:
    """The table, then the JSON line."""
    print(f"{os.cpu_count()} cores; {NEW} tokens after {PROMPT}; load {os.getloadavg()[0]:.1f} (the arms make some)")
    print(f"{'case':14s} {'program':10s} {'tokens x particles / s':>24s} {'best':>7s}")
    summary: dict[str, float] = {}
    for (method, particles), by_arm in found.items():
        seconds = {arm: [run[0] for run in runs] for arm, runs in by_arm.items()}
        for arm, times in seconds.items():
            rate = particles * NEW / statistics.median(times)
            best = particles * NEW / min(times)
            print(f"{method + ' ' + str(particles):14s} {arm:10s} {rate:24.0f} {best:7.0f}")
        if set(seconds) == set(ARMS):
            name = f"ratio_{particles}" if method == "standard" else f"ratio_{method}_{particles}"
            summary[name] = round(median_ratio(seconds["llamppl"], seconds["lmlab"]), 1)
    for arm in next(iter(found.values())):
        few, many = (found["standard", particles][arm][-1][1] for particles in (16, 64))
        print(f"{arm}: {(many - few) / 48:.2f} MB a particle")
    if ours:
        print(f"lmlab: a particle keeps {ours[1]:.2f} MB")
        summary["resample_fraction"] = round(ours[0], 4)
    print(json.dumps(summary))


if __name__ == "__main__":
    sys.exit(main())
