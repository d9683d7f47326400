"""Several heads: memory, decoding with their drafts, and the time of a step: `python -m benchmarks.multi_token`.

Memory: temporary bytes of the compiled loss and gradient of a decoder of 9 layers in all, width 256, 8 rows of 256
tokens, V = 32k, for n = 1, 2, 4, 8 heads; beside them those of the naive loss, which holds the logits of all heads.
Overhead: time of a train step of configs/multi_token.py (bytes, 4 heads) over that of one head and as many layers,
both with AdamW: Muon, the recipe's rule, takes as long in both and would hide a part of the ratio.
Decoding: that recipe is trained into --run (as `lmlab run multi_token` does; a run that is there goes on), then texts
that were held out are continued, one at a time, by plain decoding (the sampler, on head 1 without the others) and with
the drafts of 0 to 3 heads: greedily, where the texts are compared, and at temperature 0.8. A text that repeats itself
is easily drafted, and greedy ones do: the share of 8-grams that are distinct is printed. Timings are taken in turns. As
its last line one JSON object: `temp_growth_n8` bytes of 8 heads over one, `overhead_n4` step time of 4 heads over one,
`speedup_n4` tokens per second with all drafts over plain, `acceptance_n4` share of drafted tokens that were kept, both
greedy, and the same at temperature 0.8 as `speedup_n4_warm` and `acceptance_n4_warm`.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.timing import median_ratio, take_turns
from lmlab.core.errors import UserError, check
from lmlab.core.runtime import prepare
from lmlab.core.types import Array, Params, TokenBatch
from lmlab.inference.config import SamplingConfig
from lmlab.inference.sample import sample
from lmlab.inference.self_speculative import self_speculate
from lmlab.models.config import AttentionConfig, TransformerConfig
from lmlab.models.heads import multi_token_lm
from lmlab.models.heads_config import MultiTokenConfig
from lmlab.models.lm import MultiTokenLM
from lmlab.multi_token import heads_pieces, train_heads
from lmlab.objectives.multi_token import ahead, hidden_of_heads, multi_token
from lmlab.recipe import MultiToken, load_recipe
from lmlab.runs import load_heads
from lmlab.train.parallel import Share
from lmlab.train.state import State, init_state
from lmlab.train.step import make_step, total_loss

COUNTS = (1, 2, 4, 8)
"""Heads whose memory is read."""
PROMPT = 64
"""Tokens."""
WARM = 0.8
"""The temperature beside 0."""
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
    for heads in COUNTS:
        found["ours"][heads], found["naive"][heads] = (temporaries(f, heads, args) for f in (ours, naive))
        cells = [(found[name][heads] / 2**20, found[name][heads] / found[name][1]) for name in found]
        (a, b), (c, d) = cells
        print(f"{heads:6d} {a:10.0f} {b:9.2f}x {c:11.0f} {d:9.2f}x", flush=True)
    most = COUNTS[-1]
    return {f"temp_growth_n{most}": round(found["ours"][most] / found["ours"][1], 3)}


def decoding(recipe: MultiToken, args: argparse.Namespace) -> dict[str, float]:
    """Tokens per second of plain decoding, and with the drafts of 0 to n - 1 heads."""
    train_heads(recipe, Path(args.run))
    run = load_heads(Path(args.run))
    model, params = run.model, run.params
    rows = next(heads_pieces(recipe, Share(0, 1)).data.heldout()).tokens_BT
    check(args.texts <= len(rows), "--texts", args.texts, f"at most {len(rows)}, the rows of a batch of the recipe")
    prompts = [np.asarray(row[:PROMPT], np.int32) for row in rows[: args.texts]]
    decode = run.text.tokenizer.decode
    return continued(model, params, prompts, decode, 0.0, args) | {
        f"{name}_warm": value for name, value in continued(model, params, prompts, decode, WARM, args).items()
    }


def distinct(texts: Sequence[Sequence[int]], size: int = 8) -> float:
    """Share of the 8-grams of texts, each for itself, that are distinct; 1 where there are none."""
    grams = [[tuple(text[i : i + size]) for i in range(len(text) - size + 1)] for text in texts]
    return sum(len(set(some)) for some in grams) / sum(map(len, grams)) if any(grams) else 1.0


def continued(
    model: MultiTokenLM, params: Params, prompts: list[np.ndarray], decode: Callable[[Any], str], temperature: float,
    args: argparse.Namespace,
) -> dict[str, float]:  # fmt: skip
    """The table of one temperature. Above 0 all arms draw from the same distribution, but not the same texts."""
    heads, key = model.heads, jax.random.key(0)
    config = SamplingConfig(temperature=temperature, max_new_tokens=args.new)
    plain = lambda: [sample(model.lm, params, [prompt], key, config)[0] for prompt in prompts]
    drafted = lambda k: [self_speculate(model, params, [prompt], key, config, ahead=k) for prompt in prompts]
    wanted = [one.tokens.tolist() for one in plain()]
    print(f"temperature {temperature}: {len(prompts)} texts of {args.new} tokens, of whose 8-grams "
          f"{distinct(wanted):.2f} are distinct; the first goes on: {decode(wanted[0])!r:.200}")  # fmt: skip
    names = [f"{k + 1} heads" for k in range(heads)]
    arms = {name: (lambda k=k: drafted(k)) for k, name in enumerate(names)}
    times = take_turns({"plain": plain, **arms}, args.rounds)
    total, result = sum(map(len, wanted)), {}
    print(f"{'':8s} {'tokens/s':>8s} {'over plain':>10s} {'a pass':>7s} {'kept':>6s} {'same text':>9s}")
    print(f"{'plain':8s} {total / statistics.median(times['plain']):8.0f}")
    for k, name in enumerate(names):
        drawn = drafted(k)
        same = sum(one.samples[0].tokens.tolist() == text for one, text in zip(drawn, wanted, strict=True))
        passes, kept = sum(one.passes for one in drawn), statistics.mean(one.accepted for one in drawn)
        speed, ratio = total / statistics.median(times[name]), median_ratio(times["plain"], times[name])
        print(f"{name:8s} {speed:8.0f} {ratio:9.2f}x {total / passes:7.2f} {kept:6.2f} {same:5d}/{len(wanted)}")
        result = {f"speedup_n{heads}": round(ratio, 3), f"acceptance_n{heads}": round(kept, 3)}
    return result


def overhead(recipe: MultiToken, args: argparse.Namespace) -> dict[str, float]:
    """Time of a step of n heads over one of as many layers with one head."""
    arms = {}
    for heads in (1, recipe.heads):
        adamw = replace(recipe.optim, rule="adamw")
        pieces = heads_pieces(replace(recipe, heads=heads, optim=adamw), Share(0, 1))
        step = jax.jit(make_step(pieces.objective, pieces.tx), donate_argnums=0)
        held = [init_state(pieces.lm.init, pieces.tx, 0)]
        batch = next(iter(pieces.data.train.batches(0, 1)))

        def run(step: Any = step, held: list[State] = held, batch: TokenBatch = batch) -> Any:
            held[0], metrics = step(held[0], batch)
            return metrics

        arms[f"n = {heads}"] = run
    times = take_turns(arms, args.rounds)
    ratio = median_ratio(times[f"n = {recipe.heads}"], times["n = 1"])
    middles = ", ".join(f"{name} {1e3 * statistics.median(seconds):.0f} ms" for name, seconds in times.items())
    print(f"a train step with AdamW: {middles}; ratio {ratio:.3f}")
    return {f"overhead_n{recipe.heads}": round(ratio, 3)}


PARTS = ("memory", "overhead", "decoding")


def main(argv: list[str] | None = None) -> int:
    """Measure all three."""
    prepare(compile_cache=False)
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=PARTS)
    parser.add_argument("--recipe", default=str(Path(__file__).resolve().parents[1] / "configs" / "multi_token.py"))
    parser.add_argument("--run", default="runs/multi_token", help="folder that the recipe is trained into, or was")
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--memory-length", type=int, default=256)
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    try:
        for name in ("vocabulary", "memory_length", "texts", "new", "rounds"):
            check(getattr(args, name) >= 1, f"--{name.replace('_', '-')}", getattr(args, name), "at least 1")
        recipe = load_recipe(args.recipe)[1]
        check(isinstance(recipe, MultiToken), "--recipe", args.recipe, "a recipe MultiToken")
        for part in args.parts:
            check(part in PARTS, "--parts", part, f"some of {', '.join(PARTS)}")
        measure = {"memory": lambda: memory(args), "overhead": lambda: overhead(recipe, args),
                   "decoding": lambda: decoding(recipe, args)}  # fmt: skip
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
