"""Growing a TokenFormer beside training the large one from nothing (arXiv 2410.23168).

    python -m experiments.tokenformer_growth [--smoke] [--out FOLDER]

A small model (two layers of width 32, 16 parameter tokens) learns program text by bytes; then it is grown to 48 in five
ways that all train on, each with a warm-up and a schedule of its own, beside the small model trained on and large ones
from nothing at several budgets. Prints held-out loss at growth, after 30 steps and at the end, mean and standard
deviation over seeds; what training from nothing costs to reach the loss of the paper's way of growing; writes
results.json and growth.svg.
"""

import itertools
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments.library_text import Text, read_text
from experiments.results import deviation, keep, say
from lmlab.cli import exit_code
from lmlab.core.errors import check
from lmlab.core.rng import key_for
from lmlab.core.types import Array, Params, TokenBatch
from lmlab.models.config import AttentionConfig, GrowthConfig, ParameterTokens, TokenFormerConfig
from lmlab.models.flops import training_flops_per_token
from lmlab.models.growth import grow_params, grown_config
from lmlab.models.tokenformer import tokenformer
from lmlab.objectives.next_token import next_token
from lmlab.optim.chain import build_optimizer
from lmlab.optim.config import OptimConfig, ScheduleConfig
from lmlab.report.plots import drawing
from lmlab.train.state import State, new_state
from lmlab.train.step import make_evaluation, make_step, ratio_value

PAPER = "zero keys, tau kept"
GROWTHS = {
    PAPER: GrowthConfig(),
    "zero keys, tau follows": GrowthConfig(tau="follow"),
    "all random, tau follows (the authors' code)": GrowthConfig(keys="normal", tau="follow"),
    "random keys, zero values, tau follows": GrowthConfig(keys="normal", values="zeros", tau="follow"),
    "zero keys, zero values, tau kept": GrowthConfig(values="zeros"),
}
"""The ways to grow, by name."""


@dataclass(frozen=True)
class Options:
    """Grow a small TokenFormer in five ways, beside training large ones from nothing."""

    out: str = "runs/tokenformer_growth"
    """Where results.json and the figure go."""
    smoke: bool = False
    """A few steps, to see that it runs."""
    seeds: int = 3
    """Trainings of each arm, on different rows from different parameters."""
    base: int = 800
    """Steps of the small model before it grows."""
    grown: int = 200
    """Steps after it has."""
    budgets: tuple[int, ...] = (200, 400, 800, 1200, 1600, 2400)
    """Steps of large models from nothing; each is a training with a schedule of its own."""
    peak: float = 3e-3
    """Highest learning rate of every training."""
    tokens: int = 16
    """Parameter tokens before."""
    more: int = 48
    """And after."""

    def __post_init__(self) -> None:
        """Check the budgets."""
        rising = all(a < b for a, b in itertools.pairwise((0, *self.budgets)))
        check(bool(self.budgets) and rising, "--budgets", self.budgets, "numbers of steps, the least first")


MODEL = TokenFormerConfig(vocab_size=257, layers=2, width=32, max_length=32, attention=AttentionConfig(heads=2))
ROWS, LENGTH, HELD_OUT = 16, 32, 2048
"""Rows of a batch, tokens of a row, and held-out rows."""
Curve = dict[int, list[float]]
"""Held-out loss of each seed by step."""


def train(
    text: Text, peak: float, config: TokenFormerConfig, params: Params, steps: range, looks: Sequence[int]
) -> tuple[Params, Curve]:  # fmt: skip
    """The parameters after training on the batches of these steps, and held-out losses after `looks` of them.

    params: [S, ...] of S seeds.
    """
    first, advance = training(config, peak, len(steps))
    states = first(params, jax.random.split(jax.random.key(0), len(jax.tree.leaves(params)[0])))
    curve, now = {}, 0
    # One length of scan for all, so that it is compiled once.
    count = math.gcd(*looks, len(steps), 100)
    for look in sorted({*looks, len(steps)}):
        while now < look:
            states = advance(states, text.rows(steps[now], count))
            now += count
        curve[look] = held_out_loss(config)(states.params, text.held_out).tolist()
    return states.params, curve


@cache
def training(config: TokenFormerConfig, peak: float, steps: int) -> tuple[Callable[..., State], Callable[..., State]]:
    """`first(params, keys)` and `advance(states, rows)` of all seeds; arms that train alike share what is compiled."""
    lm = tokenformer(config)
    tx = build_optimizer(OptimConfig(schedule=ScheduleConfig(peak=peak)), lm.axes, steps)
    one = make_step(next_token(lm), tx)
    seeds = jax.vmap(lambda state, batch: one(state, batch)[0])
    advance = jax.jit(lambda states, rows: jax.lax.scan(lambda s, batch: (seeds(s, batch), None), states, rows)[0])
    return jax.jit(jax.vmap(lambda params, key: new_state(params, tx, key))), advance


@cache
def held_out_loss(config: TokenFormerConfig) -> Callable[[Params, TokenBatch], Array]:
    """Held-out loss of every seed, in nats a byte."""
    evaluation = make_evaluation(next_token(tokenformer(config)))

    def loss(params: Params, batch: TokenBatch) -> Array:
        return ratio_value(next(iter(evaluation(params, batch, jax.random.key(0)).losses.values())))

    return jax.jit(lambda params, batch: jax.lax.map(lambda seed: loss(seed, batch), params))


def run(options: Options) -> dict[str, Any]:
    """Train every arm; all that is printed and drawn."""
    if options.smoke:
        options = replace(options, seeds=2, base=4, grown=4, budgets=(4,))
    learn = partial(train, read_text(options.seeds, ROWS, LENGTH, 64 if options.smoke else HELD_OUT), options.peak)
    small = replace(MODEL, parameter_tokens=ParameterTokens(options.tokens))
    counts = replace(MODEL, parameter_tokens=ParameterTokens(options.more)).counts
    keys = jax.random.split(jax.random.key(1), options.seeds)
    begin = lambda config: jax.jit(jax.vmap(tokenformer(config).init))(keys)

    say("the small model")
    base, before = learn(small, begin(small), range(options.base), [])
    after = range(options.base, options.base + options.grown)
    looks = sorted({0, *(look for look in (10, 30, 60, 100, 150) if look < options.grown)})
    arms = {"small model, trained on": learn(small, base, after, looks)[1]}
    dead = {}
    for name, growth in GROWTHS.items():
        say(name)
        params, arms[name] = learn(*_grown(small, counts, base, growth), after, looks)
        dead[name] = float(jnp.max(jnp.abs(params["layers"]["ffn"]["keys"][..., small.counts.ffn :])))
    large = replace(MODEL, parameter_tokens=counts)
    scratch = {}
    for budget in options.budgets:
        say(f"large from nothing, {budget} steps")
        _, scratch[budget] = learn(large, begin(large), range(budget), [min(_early(options.grown), budget)])
    cost = {"small": training_flops_per_token(small, LENGTH), "large": training_flops_per_token(large, LENGTH)}
    result = {"options": asdict(options), "small model before growth": before[options.base], "arms": arms,
              "scratch": scratch, "largest new key": dead, "flops_per_token": cost}  # fmt: skip
    return result | {"saved": saved(result)}


def _grown(
    small: TokenFormerConfig, counts: ParameterTokens, base: Params, growth: GrowthConfig
) -> tuple[TokenFormerConfig, Params]:  # fmt: skip
    config = grown_config(small, counts, growth)
    keys = jax.random.split(key_for(jax.random.key(2), "growth"), len(jax.tree.leaves(base)[0]))
    grow = lambda params, key: grow_params(params, small, config, key, growth)
    return config, jax.jit(jax.vmap(grow))(base, keys)


def _early(steps: int) -> int:
    return min(30, steps)


def saved(result: dict[str, Any]) -> dict[str, Any]:
    """What a large model from nothing costs to reach the mean loss of the grown one, over what growing costs.

    Steps from nothing are interpolated between budgets in the logarithm of the steps; "known" says where they are not.
    """
    options, cost = result["options"], result["flops_per_token"]
    target = float(np.mean(result["arms"][PAPER][options["grown"]]))
    points = [(steps, float(np.mean(curve[steps]))) for steps, curve in result["scratch"].items()]
    steps = next((_between(a, b, target) for a, b in itertools.pairwise(points) if b[1] <= target), None)
    known = "by interpolation" if steps else "not: no budget reaches the target"
    if points[0][1] <= target:
        steps, known = float(points[0][0]), "as an upper bound: the least budget reaches the target"
    stage = options["grown"] * cost["large"]
    whole = stage + options["base"] * cost["small"]
    ratio = lambda spent: None if steps is None else round(steps * cost["large"] / spent, 2)
    return {"target loss": target, "steps from nothing": steps and round(steps), "known": known,
            "over the stage": ratio(stage), "over the small model and the stage": ratio(whole)}  # fmt: skip


def _between(a: tuple[int, float], b: tuple[int, float], target: float) -> float:
    share = (a[1] - target) / (a[1] - b[1])
    return math.exp(math.log(a[0]) + share * (math.log(b[0]) - math.log(a[0])))


def table(result: dict[str, Any]) -> str:
    """The table of all arms."""
    show = lambda losses: f"{np.mean(losses):8.4f} ±{deviation(losses):.4f}"
    end = result["options"]["grown"]
    middle = _early(end)
    lines = [f"{'held-out loss, nats a byte':46s} {'at growth':>16s} {f'+{middle}':>16s} {f'+{end}':>16s}",
             f"{'small model before growth':46s} {show(result['small model before growth']):>16s}"]  # fmt: skip
    for name, curve in result["arms"].items():
        lines.append(f"{name:46s} {show(curve[0]):>16s} {show(curve[middle]):>16s} {show(curve[end]):>16s}")
    for steps, curve in result["scratch"].items():
        name = f"large from nothing, {steps} steps"
        early, late = show(curve[min(middle, steps)]), show(curve[steps])
        lines.append(f"{name:46s} {'':16s} {early:>16s} {late:>16s}")
    dead = result["largest new key"]["zero keys, zero values, tau kept"]
    lines.append(f"largest new key after growing with zero keys and values: {dead:g}")
    lines.append(f"cost saved: {json.dumps(result['saved'])}")
    return "\n".join(lines)


def draw(result: dict[str, Any], path: Path) -> None:
    """Held-out loss after growth, and from nothing by budget."""
    with drawing(path, 10, 4) as drawn:
        left, right = drawn.subplots(1, 2)
        for name, curve in result["arms"].items():
            steps, mean = list(curve), [np.mean(losses) for losses in curve.values()]
            left.errorbar(steps, mean, [deviation(losses) for losses in curve.values()], label=name, capsize=2)
        left.set(xlabel="steps after growth", ylabel="held-out nats a byte")
        left.legend(fontsize=7)
        budgets = list(result["scratch"])
        losses = [result["scratch"][steps][steps] for steps in budgets]
        right.errorbar(budgets, [np.mean(x) for x in losses], [deviation(x) for x in losses], capsize=2,
                       label="large from nothing", color="#666666")  # fmt: skip
        right.axhline(result["saved"]["target loss"], label=f"grown ({PAPER})", color="#0072B2")
        right.set(xlabel="steps of the large model", xscale="log", xticks=budgets, xticklabels=budgets)
        right.minorticks_off()
        right.legend(fontsize=7)


def experiment(options: Options) -> int:
    """Run, write, print."""
    from lmlab.core.runtime import prepare

    prepare()
    result = run(options)
    draw(result, keep(result, options.out) / "growth.svg")
    print(table(result))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code, as `lmlab` does."""
    return exit_code(lambda: experiment(tyro.cli(Options, args=argv)), "python -m experiments.tokenformer_growth")


if __name__ == "__main__":
    sys.exit(main())
