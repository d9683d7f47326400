"""One head against several on two synthetic tasks (arXiv 2404.19737, sections 4.1 and 4.2).

    python -m experiments.multi_token [--smoke] [--out FOLDER]

Induction: names of two tokens return in random text, two in a document; how often does head 1 know the second token? A
half is had by guessing between the two that are there; for more, a head has to find the one that followed before. At
which step does each seed pass a quarter, and three quarters? Polynomials: how often is the value of an expression of m
operations right, all five coefficients? Models of equal size, several seeds at once. Prints medians and quartiles over
seeds; writes results.json and multi_token.svg.
"""

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments.results import keep, say
from lmlab.cli import exit_code
from lmlab.core.errors import check
from lmlab.core.rng import key_for
from lmlab.core.runtime import prepare
from lmlab.core.types import Array, Key, Objective, Params, TokenBatch
from lmlab.data.synthetic import (
    DEGREE,
    FILLERS,
    NAME_TOKENS,
    PAD,
    POLYNOMIAL_VOCAB,
    induction_chain,
    induction_rows,
    polynomial_rows,
)
from lmlab.models.config import AttentionConfig, TransformerConfig
from lmlab.models.heads import multi_token_lm
from lmlab.models.heads_config import MultiTokenConfig
from lmlab.models.lm import LM, MultiTokenLM
from lmlab.objectives.multi_token import ahead, multi_token
from lmlab.optim.chain import build_optimizer
from lmlab.optim.config import OptimConfig, ScheduleConfig
from lmlab.report.plots import drawing
from lmlab.train.state import State, new_state
from lmlab.train.step import make_step

MARKS = (0.25, 0.75)
"""Accuracies whose steps are told: names are copied, and the right one is. Chance is 1 / 32, a guess of two is 0.5."""


@dataclass(frozen=True)
class Options:
    """Train models of one head and of several on two synthetic tasks."""

    out: str = "runs/multi_token_tasks"
    """Where results.json and the figure go."""
    smoke: bool = False
    """A few steps of some arms, to see that it runs."""
    seeds: int = 5
    """Trainings of each arm, each with parameters, documents and draws from the one pool its own, as in other arms."""
    steps: int = 2000
    """Of the induction task."""
    polynomial_steps: int = 900
    """Of the polynomials."""
    rows: int = 32
    """Of a batch."""
    every: int = 100
    """Steps between two looks."""
    pool: int = 65536
    """Expressions to learn from, those left out that are held out."""
    held_out: int = 512
    """Documents, and expressions of each m, to look at."""

    def __post_init__(self) -> None:
        """Check that the last look is at the end."""
        check(self.every >= 1, "--every", self.every, "at least 1")
        for name, steps in (("--steps", self.steps), ("--polynomial-steps", self.polynomial_steps)):
            check(steps % self.every == 0, name, steps, f"a multiple of --every = {self.every}")


@dataclass(frozen=True)
class Task:
    """What the arms of a figure have in common."""

    batch: Callable[[Key, Array], TokenBatch]
    """`batch(seed's key, step)`."""
    score: Callable[[LM, Params, Key], dict[str, Array]]
    """`score(lm, params, seed's key)`: values by name."""
    lookahead: int
    """Tokens of a row beyond those that are read; a model of fewer heads is given fewer."""
    peak: float = 3e-3


def shuffled(model: MultiTokenLM) -> Objective:
    """The control: head 2 is taught the labels of another row, so that it can only regularise."""

    def labels(batch: TokenBatch, heads: int) -> tuple[Array, Array]:
        labels_BMT, weights_BMT = ahead(batch, heads)
        return labels_BMT.at[:, 1].set(jnp.roll(labels_BMT[:, 1], 1, axis=0)), weights_BMT

    return multi_token(model, labels=labels)


def train(
    model: MultiTokenLM, objective: Objective, task: Task, options: Options, steps: int
) -> tuple[list[int], dict[str, list[list[float]]]]:  # fmt: skip
    """Steps of the looks, and the values of each seed at each: all seeds at once, each on rows of its own."""
    tx = build_optimizer(OptimConfig(schedule=ScheduleConfig(peak=task.peak)), model.lm.axes, steps)
    step = make_step(objective, tx)
    keys = jax.vmap(jax.random.key)(jnp.arange(options.seeds))

    def one(state: State, _: None) -> tuple[State, None]:
        rows = task.batch(state.key, state.step)
        # Every arm learns head 1 from the same places.
        rows = jax.tree.map(lambda x: x[:, : x.shape[1] - task.lookahead + model.heads], rows)
        return step(state, rows)[0], None

    @jax.jit
    def advance(states: State) -> State:
        return jax.vmap(lambda state: jax.lax.scan(one, state, length=options.every)[0])(states)

    look = jax.jit(jax.vmap(lambda state: task.score(model.lm, state.params, state.key)))
    states = jax.jit(jax.vmap(lambda key: new_state(model.lm.init(key_for(key, "init")), tx, key)))(keys)
    looks = list(range(0, steps + 1, options.every))
    values: dict[str, list[list[float]]] = {}
    for now in looks:
        states = advance(states) if now else states
        for name, value_S in look(states).items():
            values.setdefault(name, []).append(np.asarray(value_S).round(4).tolist())
    return looks, values


def induction(options: Options, length: int = 64, lookahead: int = 2) -> Task:
    """Documents never seen before at every step; the text around the names is one Markov chain for each seed."""
    chain = lambda key: induction_chain(key_for(key, "chain"))

    def batch(key: Key, step: Array) -> TokenBatch:
        return induction_rows(key_for(key, "rows", step), chain(key), options.rows, length + lookahead)[0]

    def score(lm: LM, params: Params, key: Key) -> dict[str, Array]:
        held_out, known_BT = induction_rows(key_for(key, "held-out"), chain(key), options.held_out, length + 1)
        hidden_BTD, _ = lm.apply(params, held_out.tokens_BT[:, :-1])
        right_BT = jnp.argmax(lm.logits(params, hidden_BTD), axis=-1) == held_out.tokens_BT[:, 1:]
        return {"second tokens": jnp.sum(right_BT & known_BT[:, 1:]) / jnp.sum(known_BT[:, 1:])}

    return Task(batch, score, lookahead)


def polynomials(options: Options, lookahead: int = 4) -> Task:
    """Expressions of one or two operations, drawn from a pool; the value is learnt, the expression only read."""
    rng = np.random.default_rng(0)
    tests = {m: polynomial_rows(rng, [m] * options.held_out) for m in (1, 2)}
    pool = without(polynomial_rows(rng, [1, 2] * (options.pool // 2), lookahead), *tests.values())

    def batch(key: Key, step: Array) -> TokenBatch:
        chosen = jax.random.randint(key_for(key, "rows", step), (options.rows,), 0, len(pool.tokens_BT))
        return jax.tree.map(lambda x: x[chosen], pool)

    def score(lm: LM, params: Params, key: Key) -> dict[str, Array]:
        # Greedy decoding writes the value if and only if every token of it is the best one after those before it.
        del key
        found = {}
        for m, rows in tests.items():
            hidden_BTD, _ = lm.apply(params, rows.tokens_BT[:, :-1])
            right_BT = jnp.argmax(lm.logits(params, hidden_BTD), axis=-1) == rows.tokens_BT[:, 1:]
            labels_BT = rows.label_mask_BT[:, 1:]
            found[f"m = {m}"] = jnp.mean(jnp.all(right_BT | ~labels_BT, axis=1))
            found[f"coefficients, m = {m}"] = jnp.sum(right_BT & labels_BT) / (len(right_BT) * DEGREE)
        return found

    return Task(batch, score, lookahead)


def without(pool: TokenBatch, *tests: TokenBatch) -> TokenBatch:
    """The rows of a pool whose expression is in no test: there are but 7^5 of a minus."""
    written = lambda rows: [row[row != PAD].tobytes() for row in np.asarray(rows.tokens_BT)]
    known = {text for test in tests for text in written(test)}
    new_B = np.asarray([text not in known for text in written(pool)])
    return jax.tree.map(lambda x: x[new_B], pool)


def arms() -> dict[str, dict[str, tuple[MultiTokenLM, Callable[[MultiTokenLM], Objective]]]]:
    """Model and objective of every arm, by task and name."""
    names = TransformerConfig(vocab_size=FILLERS + NAME_TOKENS, layers=3, width=32, tied=False, max_length=128,
                              attention=AttentionConfig(heads=2))  # fmt: skip
    rings = replace(names, vocab_size=POLYNOMIAL_VOCAB, layers=5, width=64, attention=AttentionConfig(heads=4))
    heads = lambda model, n: multi_token_lm(MultiTokenConfig(model, n))
    two = heads(names, 2)
    return {
        "induction": {
            "n = 1": (heads(names, 1), multi_token),
            "n = 2": (two, multi_token),
            "n = 2, trunk not reduced": (heads(replace(names, layers=4), 2), multi_token),
            "n = 2, labels of head 2 shuffled": (two, shuffled),
        },
        "polynomials": {f"n = {n}": (heads(rings, n), multi_token) for n in (1, 2, 4)},
    }


def run(options: Options) -> dict[str, Any]:
    """Train every arm; all that is printed and drawn."""
    every = arms()
    if options.smoke:
        options = replace(options, seeds=2, steps=4, polynomial_steps=4, every=2, pool=64, held_out=8)
        some = {"induction": ("n = 1", "n = 2, labels of head 2 shuffled"), "polynomials": ("n = 4",)}
        every = {task: {name: every[task][name] for name in names} for task, names in some.items()}
    tasks = {"induction": (induction(options), options.steps),
             "polynomials": (polynomials(options), options.polynomial_steps)}  # fmt: skip
    result: dict[str, Any] = {"options": asdict(options), "marks": MARKS}
    for name, (task, steps) in tasks.items():
        result[name] = {}
        for arm, (model, objective) in every[name].items():
            began = time.perf_counter()
            looks, values = train(model, objective(model), task, options, steps)
            seconds = time.perf_counter() - began
            say(f"{name}, {arm}: {seconds:.0f} s")
            count = sum(x.size for x in jax.tree.leaves(jax.eval_shape(model.lm.init, jax.random.key(0))))
            result[name][arm] = {"parameters": count, "seconds": round(seconds, 1), "steps": looks, **values}
    return summarised(result)


def summarised(result: dict[str, Any]) -> dict[str, Any]:
    """With what the table shows: step at which each seed passed each of MARKS (None: never)."""
    for found in result["induction"].values():
        curves = np.asarray(found["second tokens"]).T
        first = lambda curve, mark, steps: next((s for s, v in zip(steps, curve, strict=True) if v >= mark), None)
        found["passed"] = {str(mark): [first(curve, mark, found["steps"]) for curve in curves] for mark in MARKS}
    return result


def spread(values: Sequence[float | None]) -> str:
    """Median and quartiles; a seed that never got there counts as later than all others."""
    known = [math.inf if value is None else value for value in values]
    low, middle, high = np.quantile(known, (0.25, 0.5, 0.75), method="nearest")
    show = lambda x: "never" if math.isinf(x) else f"{x:.3f}" if x <= 1 else f"{x:.0f}"
    return f"{show(middle)} ({show(low)} to {show(high)})"


def table(result: dict[str, Any]) -> str:
    """Medians and quartiles over seeds."""
    heads = [f"step past {mark}" for mark in MARKS] + ["accuracy at the end"]
    lines = [f"{'induction':34s} {'parameters':>10s}" + "".join(f" {head:>24s}" for head in heads)]
    for arm, found in result["induction"].items():
        cells = [*found["passed"].values(), found["second tokens"][-1]]
        lines.append(f"{arm:34s} {found['parameters']:10d}" + "".join(f" {spread(cell):>24s}" for cell in cells))
    lines.append(f"{'polynomials, exact':34s} {'parameters':>10s} {'m = 1':>24s} {'m = 2':>24s}")
    for arm, found in result["polynomials"].items():
        exact = [spread(found[f"m = {m}"][-1]) for m in (1, 2)]
        lines.append(f"{arm:34s} {found['parameters']:10d} {exact[0]:>24s} {exact[1]:>24s}")
    return "\n".join(lines)


def draw(result: dict[str, Any], path: Path) -> None:
    """Accuracy on second tokens by step, each seed and the median; exact values by number of operations."""
    with drawing(path, 10, 4) as drawn:
        left, right = drawn.subplots(1, 2)
        for number, (arm, found) in enumerate(result["induction"].items()):
            values, color = np.asarray(found["second tokens"]), f"C{number}"
            left.plot(found["steps"], values, color=color, linewidth=0.6, alpha=0.4)
            left.plot(found["steps"], np.median(values, axis=1), color=color, linewidth=2, label=arm)
        for mark in MARKS:
            left.axhline(mark, color="#666666", linewidth=0.8, linestyle=":")
        left.set(xlabel="step", ylabel="second tokens of known names, accuracy")
        left.legend(fontsize=8, frameon=False)
        for number, (arm, found) in enumerate(result["polynomials"].items()):
            for m in (1, 2):
                last = found[f"m = {m}"][-1]
                place = m + 0.15 * (number - 1)
                right.plot([place] * len(last), last, "o", color=f"C{number}", markersize=4, alpha=0.5)
                label = arm if m == 1 else None
                right.plot(place, np.median(last), "_", color=f"C{number}", markersize=18, label=label)
        right.set(xlabel="operations", ylabel="values exactly right", xticks=[1, 2])
        right.legend(fontsize=8, frameon=False)


def experiment(options: Options) -> int:
    """Run, write, print."""
    prepare()
    result = run(options)
    draw(result, keep(result, options.out) / "multi_token.svg")
    print(table(result))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code, as `lmlab` does."""
    return exit_code(lambda: experiment(tyro.cli(Options, args=argv)), "python -m experiments.multi_token")


if __name__ == "__main__":
    sys.exit(main())
