"""Permutations of symbols: an instruction says which; its effect is distilled into the weights."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.context_distillation_arms import Arm, Curves, curves_of, member, pools, recovery, stacked
from experiments.results import say
from lmlab.core.types import Array, Batch, Params, TokenBatch
from lmlab.data.distillation import Example, distillation_of, lay_out_examples
from lmlab.distillation import on_policy, store_predictions, student_answers, teacher_answers
from lmlab.inference.config import SamplingConfig
from lmlab.models.config import AttentionConfig, TransformerConfig
from lmlab.models.transformer import transformer
from lmlab.objectives.distill import TEACHER, distill, hard_labels
from lmlab.objectives.divergence import jensen_shannon, reverse_kl
from lmlab.objectives.next_token import next_token

TASKS, SYMBOLS, SIZE = 8, 16, 4
"""Permutations, symbols that there are, symbols of an input (all different)."""
SEPARATOR, ONE, NAMES = SYMBOLS, SYMBOLS + 1, SYMBOLS + 3
"""Tokens: symbols, separator, the two digits of instructions, a name of each task that pre-training never shows."""
BITS = 3
TEACHER_LENGTH, STUDENT_LENGTH = 16, 16
MODEL = TransformerConfig(
    vocab_size=NAMES + TASKS, layers=2, width=64, max_length=32, attention=AttentionConfig(heads=4),
)  # fmt: skip
LM = transformer(MODEL)
AT_ONCE = 4
"""Tasks that are distilled together, or one after another."""
K = 4
"""Tokens stored of the teacher."""
PEAK = 3e-4
"""Learning rate of all arms."""


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    seeds: int
    pretraining: int
    steps: int
    inputs: int
    held_out: int
    looks: int = 10
    rows: int = 64
    arms: tuple[str, ...] = ()
    """By name; empty: all."""


def permutations() -> np.ndarray:
    """[TASKS, SIZE], all different."""
    rng, found = np.random.default_rng(0), {}
    while len(found) < TASKS:
        one = rng.permutation(SIZE)
        found[one.tobytes()] = one
    return np.stack(list(found.values()))


def instruction(task: Any) -> Any:
    """Tokens [..., BITS]: the number of the task in binary."""
    return ONE + (task[..., None] >> np.arange(BITS).reshape(*(1,) * task.ndim, BITS)) % 2


def held_out(inputs: Any) -> Any:
    """Whether an input [..., SIZE] is one to be looked at and never to be learnt from: a fifth of them."""
    return inputs.sum(-1) % 5 == 0


def draw_inputs(rng: np.random.Generator, count: int, wanted: bool) -> np.ndarray:
    """Different inputs [count, SIZE], held out or not."""
    drawn = np.argsort(rng.random((12 * count, SYMBOLS)), axis=1)[:, :SIZE].astype(np.int32)
    drawn = np.unique(drawn[held_out(drawn) == wanted], axis=0)
    return rng.permutation(drawn)[:count]


def pretraining_rows(pool: Array, key: Any, rows: int) -> TokenBatch:
    """Every second row without its instruction. pool: inputs; labels are the answers."""
    keys = jax.random.split(key, 3)
    inputs = pool[jax.random.randint(keys[0], (rows,), 0, len(pool))]
    tasks = jax.random.randint(keys[1], (rows,), 0, TASKS)
    answers = jnp.take_along_axis(inputs, jnp.asarray(permutations())[tasks], axis=1)
    rest = jnp.concatenate([inputs, jnp.full((rows, 1), SEPARATOR), answers], axis=1)
    told = jnp.concatenate([instruction(tasks), rest], axis=1)
    untold = jnp.concatenate([rest, jnp.zeros((rows, BITS), rest.dtype)], axis=1)
    shown = jax.random.bernoulli(keys[2], 0.5, (rows, 1))
    places = jnp.broadcast_to(jnp.arange(told.shape[1]), told.shape)
    length = jnp.where(shown, told.shape[1], rest.shape[1])
    begin = length - SIZE
    return TokenBatch(
        jnp.where(shown, told, untold).astype(jnp.int32), (places < length).astype(jnp.int32), places.astype(jnp.int32),
        (places >= begin) & (places < length),
    )  # fmt: skip


def chances(params: Params, before: np.ndarray, inputs: np.ndarray, task: Any) -> tuple[Array, Array]:
    """Probability of the right answer, and whether greedy decoding writes it, means over inputs; [] each.

    before: tokens [n] in front of every input.
    """
    answers = jnp.take_along_axis(inputs, jnp.broadcast_to(jnp.asarray(permutations())[task], inputs.shape), axis=1)
    ahead = jnp.broadcast_to(before, (len(inputs), before.shape[0]))
    tokens = jnp.concatenate([ahead, inputs, jnp.full((len(inputs), 1), SEPARATOR), answers], axis=1)
    hidden, _ = LM.apply(params, tokens[:, :-1])
    logprobs = jax.nn.log_softmax(LM.logits(params, hidden[:, -SIZE:]))
    right = jnp.take_along_axis(logprobs, answers[..., None], axis=2)[..., 0]
    greedy = jnp.all(jnp.argmax(logprobs, axis=-1) == answers, axis=1)
    return jnp.mean(jnp.exp(jnp.sum(right, axis=1))), jnp.mean(greedy)


def scores(inputs: np.ndarray, tasks: Array) -> Callable[[Params], dict[str, np.ndarray]]:
    """Of parameters [S, ...], seed s with its task: probability of the right answer without the instruction and with
    it, whether greedy decoding writes it without, and whether it writes those of the other tasks with theirs.
    """

    def one(params: Params, task: Array) -> dict[str, Array]:
        chance, greedy = chances(params, jnp.zeros(0, jnp.int32), inputs, task)
        told = [chances(params, instruction(jnp.asarray(i)), inputs, i) for i in range(TASKS)]
        chance_told, greedy_told = (jnp.stack(column) for column in zip(*told, strict=True))
        others = (jnp.sum(greedy_told) - greedy_told[task]) / (TASKS - 1)
        return {"without": chance, "greedy without": greedy, "with": chance_told[task], "others with": others}

    every = jax.jit(jax.vmap(one))
    return lambda params: every(params, tasks)


NOTHING = np.zeros(0, np.int32)


def asked(
    inputs: np.ndarray, tasks: Sequence[int], own: Callable[[int], np.ndarray] = lambda task: NOTHING
) -> list[Example]:
    """Unlabelled inputs with the instruction of a task for the teacher. own: the context of the student."""
    return [
        Example(
            f"input {i}", instruction_tokens(task), np.append(x, SEPARATOR).astype(np.int32), NOTHING,
            student_context=own(task),
        )
        for i, (x, task) in enumerate(zip(inputs, tasks, strict=True))
    ]  # fmt: skip


def instruction_tokens(task: int) -> np.ndarray:
    """The instruction of a task, int32 [BITS]."""
    return instruction(np.asarray(task)).astype(np.int32)


def name_tokens(task: int) -> np.ndarray:
    """The name of a task, int32 [1]."""
    return np.asarray([NAMES + task], np.int32)


def generic(inputs: np.ndarray) -> list[Example]:
    """The same inputs with the instruction of every task in turn, which the student is given too: nothing is to change.

    Half of the data of prompt distillation are of this kind (arXiv 2112.00861, section 2.3).
    """
    return asked(inputs, [i % TASKS for i in range(len(inputs))], instruction_tokens)


SAMPLING = SamplingConfig(max_new_tokens=SIZE)


def answered(params: Params, examples: Sequence[Sequence[Example]], ask: Callable[..., Any]) -> list[list[Example]]:
    """Answers for the examples of every seed, by its model."""
    return [ask(LM, member(params, s), some, jax.random.key(100 + s), SAMPLING, rows=512)[0]
            for s, some in enumerate(examples)]  # fmt: skip


def pretrain(sizes: Sizes) -> Params:
    """Parameters [S, ...] that know all tasks, and follow instructions."""
    params = jax.jit(jax.vmap(LM.init))(jax.random.split(jax.random.key(0), sizes.seeds))
    pool = np.stack([draw_inputs(np.random.default_rng(s), 8000, False) for s in range(sizes.seeds)])
    arm = Arm(LM, next_token(LM), params, sizes.pretraining, 128, 3e-3, pretraining_rows)
    return arm.advance(jnp.asarray(pool), sizes.pretraining)


def run_tasks(sizes: Sizes) -> dict[str, Any]:
    """All arms on one task, and several tasks at once or in turn."""
    say("permutations: pre-training")
    base = pretrain(sizes)
    tasks = np.arange(sizes.seeds) % TASKS
    inputs = draw_inputs(np.random.default_rng(10**6), sizes.held_out, True)
    score = scores(inputs, jnp.asarray(tasks))
    start = {name: np.asarray(value).round(4).tolist() for name, value in score(base).items()}
    result: dict[str, Any] = {"tasks": tasks.tolist(), "start": start, "arms": {}}
    unlabelled = [draw_inputs(np.random.default_rng(1000 + s), sizes.inputs, False) for s in range(sizes.seeds)]
    for name, run in arms(base, unlabelled, tasks, sizes, score).items():
        if sizes.arms and name not in sizes.arms:
            continue
        say(f"permutations: {name}")
        curves = run()
        result["arms"][name] = {
            **curves, "recovery": recovery(curves["without"], start["with"]),
            "drift": (np.asarray(curves["others with"][-1]) - start["others with"]).round(4).tolist(),
        }  # fmt: skip
    result["steps"] = list(range(0, sizes.steps + 1, sizes.steps // sizes.looks))
    say("permutations: several tasks")
    result["several"] = several(base, unlabelled, inputs, sizes)
    return result


def arms(
    base: Params, unlabelled: Sequence[np.ndarray], tasks: np.ndarray, sizes: Sizes,
    score: Callable[[Params], dict[str, np.ndarray]],
) -> dict[str, Callable[[], Curves]]:  # fmt: skip
    """By name, what trains an arm and tells its curves."""
    examples = [asked(x, [int(task)] * len(x)) for x, task in zip(unlabelled, tasks, strict=True)]
    taught = answered(base, examples, teacher_answers)
    pool = pools(taught, TEACHER_LENGTH, STUDENT_LENGTH)
    both = {**base, TEACHER: base}
    every = sizes.steps // sizes.looks

    def train(objective: Any, params: Params, pool: Any, refresh: Any = None) -> Curves:
        arm = Arm(LM, objective, params, sizes.steps, sizes.rows, PEAK)
        return curves_of(arm, pool, sizes.steps, every, score, refresh)[1]

    rng = np.random.default_rng(0)

    def mixed(params: Params) -> Batch:
        own = answered(params, examples, student_answers)
        both = [on_policy(*pair, 0.5, rng) for pair in zip(taught, own, strict=True)]
        return pools(both, TEACHER_LENGTH, STUDENT_LENGTH)

    def half_generic() -> Batch:
        rest = answered(base, [generic(x) for x in unlabelled], teacher_answers)
        return pools([a + b for a, b in zip(taught, rest, strict=True)], TEACHER_LENGTH, STUDENT_LENGTH)

    def alone() -> Batch:
        return pools(answered(base, examples, student_answers), TEACHER_LENGTH, STUDENT_LENGTH)

    return {
        "forward KL": lambda: train(distill(LM), both, pool),
        "forward KL, half generic": lambda: train(distill(LM), both, half_generic()),
        "reverse KL": lambda: train(distill(LM, reverse_kl), both, pool),
        "JS 0.5": lambda: train(distill(LM, jensen_shannon(0.5)), both, pool),
        f"top {K}": lambda: train(distill(LM), base, top_k_pool(base, taught)),
        "hard, 1 sample": lambda: train(next_token(LM), base, jax.vmap(hard_labels)(pool)),
        "on-policy 0.5": lambda: train(distill(LM), both, pool, mixed),
        "control: teacher shuffled": lambda: train(distill(LM), both, shuffled(pool)),
        "control: no teacher": lambda: train(next_token(LM), base, jax.vmap(hard_labels)(alone())),
    }


def shuffled(pool: Batch) -> Batch:
    """The student reads another input than the one that the teacher, and the answer, are about."""
    tokens = pool.student.tokens_BT
    moved = tokens.at[:, :, :SIZE].set(jnp.roll(tokens[:, :, :SIZE], 1, axis=1))
    return pool.replace(student=pool.student.replace(tokens_BT=moved))


def top_k_pool(base: Params, taught: Sequence[Sequence[Example]]) -> Batch:
    """Rows with stored predictions in place of what the teacher reads."""
    found = []
    for seed, examples in enumerate(taught):
        rows = lay_out_examples(examples, TEACHER_LENGTH, STUDENT_LENGTH, shared=False, per_row=1)
        stored = store_predictions(rows, LM, member(base, seed), K, batch_size=512)
        found.append(distillation_of(stored, range(stored.rows), stored.rows))
    return stacked(found)


def several(base: Params, unlabelled: Sequence[np.ndarray], inputs: np.ndarray, sizes: Sizes) -> dict[str, Any]:
    """Instructions of several tasks, each distilled into a name: all at once, or each with the last student as teacher.

    The same number of steps in all; and with generic data as the other half of both.
    """

    def chances_after(before: Callable[[int], np.ndarray]) -> Callable[[Params], Array]:
        one = lambda params: jnp.stack([chances(params, before(i), inputs, i)[0] for i in range(AT_ONCE)])
        return jax.jit(jax.vmap(one))

    named, with_instruction = chances_after(name_tokens), chances_after(instruction_tokens)

    def stage(arm: Arm, teacher: Params, tasks: Sequence[int], steps: int, half: bool) -> Params:
        examples = [asked(x, [tasks[i % len(tasks)] for i in range(len(x))], name_tokens) + (generic(x) if half else [])
                    for x in unlabelled]  # fmt: skip
        pool = pools(answered(teacher, examples, teacher_answers), TEACHER_LENGTH, STUDENT_LENGTH)
        arm.begin({**teacher, TEACHER: teacher})
        return arm.advance(pool, steps)

    show = lambda values: np.asarray(values).round(4).tolist()
    whole, part = (Arm(LM, distill(LM), {**base, TEACHER: base}, steps, sizes.rows, PEAK)
                   for steps in (sizes.steps, sizes.steps // AT_ONCE))  # fmt: skip
    found: dict[str, Any] = {"floor": show(named(base)), "ceiling": show(with_instruction(base))}
    for half, suffix in ((False, ""), (True, ", half generic")):
        together = stage(whole, base, range(AT_ONCE), sizes.steps, half)
        found[f"at once{suffix}"] = show(named(together))
        found[f"at once{suffix}: instructed"] = show(with_instruction(together))
        params = base
        for task in range(AT_ONCE):
            params = stage(part, params, [task], sizes.steps // AT_ONCE, half)
            found[f"in turn{suffix}, after {task + 1}"] = show(named(params))
        found[f"in turn{suffix}: instructed"] = show(with_instruction(params))
    return found
