"""Several heads: memory, decoding with their drafts, and the time of a step: `python -m benchmarks.multi_token`.

Memory: temporary bytes of the compiled loss and gradient of a decoder of 9 layers in all, width 256, 8 rows of 256
tokens, V = 32k, for n = 1, 2, 4, 8 heads; beside them those of the naive loss, which holds the logits of all heads.
Decoding: a model of bytes with 4 heads is trained on Python's standard library for some minutes; then texts that were
held out are continued greedily, one at a time, by plain decoding of head 1 (without the other heads) and with the
drafts of heads 2 to k. The texts are compared. Overhead: time of a train step of that model over that of one head and
as many layers. Timings are taken in turns. As its last line one JSON object: `temp_growth_n8` bytes of 8 heads over
one, `speedup_n4` tokens per second with all drafts over plain, `acceptance_n4` share of drafted tokens that were kept,
`overhead_n4` step time of 4 heads over one.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.timing import median_ratio, take_turns
from lmlab.core.errors import UserError, check
from lmlab.core.runtime import prepare
from lmlab.core.types import Array, Params, TokenBatch
from lmlab.data.config import DataConfig
from lmlab.data.open import Data, open_data
from lmlab.inference.config import SamplingConfig
from lmlab.inference.sample import sample
from lmlab.inference.self_speculative import self_speculate
from lmlab.models.config import AttentionConfig, ExecutionConfig, TransformerConfig
from lmlab.models.heads import multi_token_lm
from lmlab.models.heads_config import MultiTokenConfig
from lmlab.models.lm import MultiTokenLM
from lmlab.objectives.multi_token import ahead, hidden_of_heads, multi_token
from lmlab.optim.chain import build_optimizer
from lmlab.optim.config import OptimConfig, ScheduleConfig
from lmlab.train.state import State, init_state
from lmlab.train.step import make_step, total_loss

HEADS = 4
PROMPT = 64
Loss = Callable[[Params, TokenBatch], Array]


def ours(model: MultiTokenLM) -> Loss:
    """The objective, as the step divides it."""
    objective = multi_token(model)

    def loss(params: Params, batch: TokenBatch) -> Array:
        terms = objective(params, batch, jax.random.key(0))
        return total_loss(terms, {name: term.weight for name, term in terms.losses.items()})

    return loss


def naive(model: MultiTokenLM) -> Loss:
    """The logits of all heads at once."""

    def loss(params: Params, batch: TokenBatch) -> Array:
        labels_BMT, weights_BMT = ahead(batch, model.heads)
        logits = model.lm.logits(params, hidden_of_heads(model, params, batch))
        nll_BMT = optax.softmax_cross_entropy_with_integer_labels(logits, labels_BMT)
        return jnp.sum(jnp.sum(weights_BMT * nll_BMT, axis=(0, 2)) / jnp.sum(weights_BMT, axis=(0, 2)))

    return loss


def temporaries(build: Callable[[MultiTokenLM], Loss], heads: int, args: argparse.Namespace) -> int:
    """Bytes of temporaries of loss and gradient."""
    config = TransformerConfig(vocab_size=args.vocabulary, layers=9, width=256, attention=AttentionConfig(heads=4))
    model = multi_token_lm(MultiTokenConfig(config, heads))
    row = jax.ShapeDtypeStruct((8, args.memory_length + heads), jnp.int32)
    batch = TokenBatch(row, row, row, jax.ShapeDtypeStruct(row.shape, bool))
    params = jax.eval_shape(model.lm.init, jax.random.key(0))
    compiled = jax.jit(jax.value_and_grad(build(model))).lower(params, batch).compile()
    return int(compiled.memory_analysis().temp_size_in_bytes)


def memory(args: argparse.Namespace) -> dict[str, float]:
    """The table of bytes."""
    print(f"{'heads':>6s} {'ours, MiB':>10s} {'over n = 1':>10s} {'naive, MiB':>11s} {'over n = 1':>10s}")
    found: dict[str, dict[int, int]] = {"ours": {}, "naive": {}}
    for heads in (1, 2, 4, 8):
        found["ours"][heads], found["naive"][heads] = (temporaries(f, heads, args) for f in (ours, naive))
        cells = [(found[name][heads] / 2**20, found[name][heads] / found[name][1]) for name in found]
        (a, b), (c, d) = cells
        print(f"{heads:6d} {a:10.0f} {b:9.2f}x {c:11.0f} {d:9.2f}x", flush=True)
    return {"temp_growth_n8": round(found["ours"][8] / found["ours"][1], 3)}


def byte_model(heads: int, args: argparse.Namespace) -> MultiTokenLM:
    """The model of bytes, as many layers for any number of heads."""
    attention = AttentionConfig(heads=args.width // 32, kv_heads=args.width // 64)
    config = TransformerConfig(
        vocab_size=257, layers=args.layers, width=args.width, max_length=1024, attention=attention,
        execution=ExecutionConfig(unroll=0),
    )  # fmt: skip
    return multi_token_lm(MultiTokenConfig(config, heads))


def make_training(heads: int, args: argparse.Namespace) -> tuple[MultiTokenLM, Any, State]:
    """Model, compiled step and first state, by the recipe of `make demo`."""
    model = byte_model(heads, args)
    schedule = ScheduleConfig(peak=args.peak, decay="wsd", end=0.0)
    tx = build_optimizer(OptimConfig(rule="muon", schedule=schedule), model.lm.axes, args.steps)
    step = jax.jit(make_step(multi_token(model), tx), donate_argnums=0)
    return model, step, init_state(model.lm.init, tx, 0)


def trained(data: Data, args: argparse.Namespace) -> tuple[MultiTokenLM, Params]:
    """The model with its heads after `--steps`."""
    model, step, state = make_training(HEADS, args)
    for number, batch in enumerate(data.train.batches(0, args.steps), start=1):
        state, metrics = step(state, batch)
        if number % 100 == 0 or number == args.steps:
            nats = " ".join(f"{float(metrics[f'loss/head_{i + 1}']):.3f}" for i in range(HEADS))
            print(f"step {number}: nats per byte of the heads {nats}", flush=True)
    return model, state.params


def decoding(data: Data, args: argparse.Namespace) -> dict[str, float]:
    """Tokens per second of plain decoding, and with the drafts of 1 to 3 heads."""
    model, params = trained(data, args)
    rows = next(data.heldout()).tokens_BT
    prompts = [np.asarray(row[:PROMPT], np.int32) for row in rows[: args.texts]]
    greedy, key = SamplingConfig(temperature=0, max_new_tokens=args.new), jax.random.key(0)
    plain = lambda: [sample(model.lm, params, [prompt], key, greedy)[0] for prompt in prompts]
    drafted = lambda k: [self_speculate(model, params, [prompt], key, greedy, ahead=k) for prompt in prompts]
    wanted = [one.tokens.tolist() for one in plain()]
    print(
        f"{args.texts} texts, {args.new} bytes each; the first goes on: {bytes(t for t in wanted[0] if t < 256)!r:.200}"
    )
    arms: dict[str, Callable[[], Any]] = {"plain": plain}
    arms |= {f"{k + 1} heads": (lambda k=k: drafted(k)) for k in range(HEADS)}
    times = take_turns(arms, args.rounds)
    result = {}
    print(f"{'':8s} {'bytes/s':>8s} {'over plain':>10s} {'a pass':>7s} {'kept':>6s} {'same text':>9s}")
    for k, name in enumerate(arms, start=-1):
        runs = [one.samples[0].tokens.tolist() for one in drafted(k)] if k >= 0 else wanted
        same = sum(a == b for a, b in zip(runs, wanted, strict=True))
        passes = sum(one.passes for one in drafted(k)) if k >= 0 else args.texts * args.new
        kept = statistics.mean(one.accepted for one in drafted(k)) if k >= 0 else 0.0
        total = sum(map(len, wanted))
        speed, ratio = total / statistics.median(times[name]), median_ratio(times["plain"], times[name])
        print(f"{name:8s} {speed:8.0f} {ratio:9.2f}x {total / passes:7.2f} {kept:6.2f} {same:5d}/{len(wanted)}")
        if k == HEADS - 1:
            result = {"speedup_n4": round(ratio, 3), "acceptance_n4": round(kept, 3)}
    return result


def overhead(data: Data, args: argparse.Namespace) -> dict[str, float]:
    """Time of a step of 4 heads over one of as many layers with one head."""
    batch = next(iter(data.train.batches(0, 1)))
    arms = {}
    for heads in (1, HEADS):
        _, step, state = make_training(heads, args)
        kept = [state]
        # Each arm sees rows of T + its own n tokens.
        cut = jax.tree.map(lambda x, n=heads: x[:, : args.length + n], batch)

        def run(step: Any = step, kept: list[State] = kept, cut: TokenBatch = cut) -> Any:
            kept[0], metrics = step(kept[0], cut)
            return metrics

        arms[f"n = {heads}"] = run
    times = take_turns(arms, args.rounds)
    ratio = median_ratio(times[f"n = {HEADS}"], times["n = 1"])
    middles = ", ".join(f"{name} {1e3 * statistics.median(seconds):.0f} ms" for name, seconds in times.items())
    print(f"a train step: {middles}; ratio {ratio:.3f}")
    return {"overhead_n4": round(ratio, 3)}


def main(argv: list[str] | None = None) -> int:
    """Measure all three."""
    prepare(compile_cache=False)
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=["memory", "overhead", "decoding"])
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--memory-length", type=int, default=256)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--peak", type=float, default=4e-3)
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    try:
        for name in (
            "vocabulary",
            "memory_length",
            "layers",
            "width",
            "length",
            "rows",
            "steps",
            "texts",
            "new",
            "rounds",
        ):
            check(getattr(args, name) >= 1, f"--{name.replace('_', '-')}", getattr(args, name), "at least 1")
        data = open_data(DataConfig(length=args.length, batch_size=args.rows), lookahead=HEADS)
        measure = {"memory": lambda: memory(args), "overhead": lambda: overhead(data, args),
                   "decoding": lambda: decoding(data, args)}  # fmt: skip
        for part in args.parts:
            check(part in measure, "--parts", part, f"some of {', '.join(measure)}")
        print(f"{jax.devices()[0].device_kind}, float32")
        result: dict[str, float] = {}
        for part in args.parts:
            result |= measure[part]()
    except UserError as error:
        print(f"multi_token: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
