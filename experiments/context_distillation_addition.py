"""Addition with a scratch-pad, distilled to direct answers, against direct training on as many labels."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.context_distillation_arms import Arm, curves_of, member, pools
from experiments.results import say
from lmlab.core.types import Array, Batch, Params, TokenBatch
from lmlab.data.distillation import Example
from lmlab.distillation import after, teacher_answers
from lmlab.inference.config import SamplingConfig
from lmlab.models.config import AttentionConfig, TransformerConfig
from lmlab.models.transformer import transformer
from lmlab.objectives.distill import TEACHER, distill, hard_labels
from lmlab.objectives.next_token import next_token

PLUS, EQUALS, WORK, ANSWER = 10, 11, 12, 13
"""Tokens after the ten digits. WORK is the context that asks for a scratch-pad, which ends in ANSWER."""
LM = transformer(TransformerConfig(
    vocab_size=14, layers=2, width=64, max_length=32, positions="learned", attention=AttentionConfig(heads=4),
))  # fmt: skip
ROWS = 32
"""Sums of a batch, while distilling."""


def lengths(digits: int) -> tuple[int, int]:
    """Tokens of a sum for the teacher and for the student."""
    return 5 * digits + 5, 3 * digits + 3


def digits_of(numbers: Array, count: int) -> Array:
    """[N, count] decimal digits, the last one last."""
    return (numbers[:, None] // 10 ** jnp.arange(count - 1, -1, -1)[None]) % 10


def written(pairs: Array, digits: int) -> tuple[Array, Array, Array]:
    """Question, scratch-pad and answer of sums [N, 2]: from the right, digit and carry of every place."""
    one = lambda token: jnp.full((len(pairs), 1), token)
    left, right = digits_of(pairs[:, 0], digits), digits_of(pairs[:, 1], digits)
    question = jnp.concatenate([left, one(PLUS), right, one(EQUALS)], axis=1)
    work = []
    for place in range(digits):
        size = 10 ** (place + 1)
        low = jnp.sum(pairs % size, axis=1)
        work += [low % size // 10**place, low // size]
    return question, jnp.concatenate([jnp.stack(work, axis=1), one(ANSWER)], axis=1), digits_of(
        jnp.sum(pairs, axis=1), digits + 1)  # fmt: skip


def with_work(pool: Array, key: Any, rows: int, digits: int) -> TokenBatch:
    """Rows of pre-training: WORK, question, scratch-pad, answer; the last two are labels."""
    pairs = pool[jax.random.randint(key, (rows,), 0, len(pool))]
    question, work, answer = written(pairs, digits)
    tokens = jnp.concatenate([jnp.full((rows, 1), WORK), question, work, answer], axis=1).astype(jnp.int32)
    places = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    return TokenBatch(tokens, jnp.ones_like(tokens), places, places > question.shape[1])


def right(params: Params, pairs: Array, digits: int) -> Array:
    """Share of sums that greedy decoding writes at once, []."""
    question, _, answer = written(pairs, digits)
    tokens = jnp.concatenate([question, answer], axis=1)
    hidden, _ = LM.apply(params, tokens[:, :-1])
    best = jnp.argmax(LM.logits(params, hidden[:, question.shape[1] - 1 :]), axis=-1)
    return jnp.mean(jnp.all(best == answer, axis=1))


def questions(pairs: np.ndarray, digits: int, answers: bool) -> list[Example]:
    """Sums for the teacher to work out; or with their answers, labels in the paper's sense."""
    question, _, answer = (np.asarray(x, np.int32) for x in written(jnp.asarray(pairs), digits))
    nothing = np.zeros(0, np.int32)
    return [Example(f"sum {i}", np.asarray([WORK], np.int32), x, answer[i] if answers else nothing)
            for i, x in enumerate(question)]  # fmt: skip


def run_addition(
    seeds: int, digits: int, pretraining: int, steps: int, labels: int, held_out: int, looks: int = 10,
    some: tuple[str, ...] = (),
) -> dict[str, Any]:  # fmt: skip
    """Accuracy on held-out sums, answered at once, of every arm; or of some by name."""
    say("addition: pre-training with scratch-pads")
    rng = np.random.default_rng(0)
    every = rng.permutation(100**digits)[: min(100**digits, 4 * (labels + held_out))]
    sums = np.stack([every // 10**digits, every % 10**digits], axis=1)
    test, known = sums[:held_out], sums[held_out : held_out + labels]
    params = jax.jit(jax.vmap(LM.init))(jax.random.split(jax.random.key(0), seeds))
    # The pool of pre-training has no held-out sum.
    pool = jnp.asarray(np.broadcast_to(sums[held_out:], (seeds, *sums[held_out:].shape)))
    draw = lambda pool, key, rows: with_work(pool, key, rows, digits)
    base = Arm(LM, next_token(LM), params, pretraining, 64, 3e-3, draw).advance(pool, pretraining)
    score = jax.jit(jax.vmap(lambda params: {"at once": right(params, jnp.asarray(test), digits)}))
    taught, counts = _taught(base, questions(known, digits, False), digits, seeds)
    result: dict[str, Any] = {"digits": digits, "labels": labels, "teacher": _worked(base, test, digits, seeds),
                              "dropped": counts, "arms": {}}  # fmt: skip
    labelled = pools([questions(known, digits, True)] * seeds, *lengths(digits))
    both = {**base, TEACHER: base}
    for name, objective, start, pool in (
        ("distilled, soft", distill(LM), both, taught),
        ("distilled, hard", next_token(LM), base, jax.vmap(hard_labels)(taught)),
        ("labels, from the same model", next_token(LM), base, jax.vmap(hard_labels)(labelled)),
        ("labels, from nothing", next_token(LM), params, jax.vmap(hard_labels)(labelled)),
        ("control: scratch-pads of other sums", distill(LM), both, _other_work(taught)),
    ):
        if some and name not in some:
            continue
        say(f"addition: {name}")
        arm = Arm(LM, objective, start, steps, ROWS, 1e-3)
        result["arms"][name] = curves_of(arm, pool, steps, steps // looks, score)[1]
    result["steps"] = list(range(0, steps + 1, steps // looks))
    return result


def _taught(base: Params, examples: list[Example], digits: int, seeds: int) -> tuple[Batch, list[int]]:
    """The teacher's answers after its scratch-pads, drawn at temperature 1; those without an answer are dropped."""
    config = SamplingConfig(max_new_tokens=3 * digits + 2)
    found = [teacher_answers(LM, member(base, s), examples, jax.random.key(s), config, extract=after(ANSWER), rows=512)
             for s in range(seeds)]  # fmt: skip
    whole = [[x for x in some if len(x.answer) == digits + 1] for some, _ in found]
    return pools(whole, *lengths(digits)), [len(examples) - len(some) for some in whole]


def _worked(base: Params, test: np.ndarray, digits: int, seeds: int) -> list[float]:
    """Share of held-out sums that the teacher has right after its scratch-pad, greedily."""
    config = SamplingConfig(max_new_tokens=3 * digits + 2, temperature=0.0)
    examples, shares = questions(test, digits, False), []
    wanted = {x.where: x.answer for x in questions(test, digits, True)}
    for s in range(seeds):
        told, _ = teacher_answers(LM, member(base, s), examples, jax.random.key(s), config, extract=after(ANSWER),
                                  rows=512)  # fmt: skip
        shares.append(round(sum(np.array_equal(x.answer, wanted[x.where]) for x in told) / len(test), 4))
    return shares


def _other_work(taught: Batch) -> Batch:
    """The student reads another question than the teacher has answered."""
    size = int(np.argmax(np.asarray(taught.student.tokens_BT[0, 0]) == EQUALS))
    tokens = taught.student.tokens_BT
    moved = tokens.at[:, :, :size].set(jnp.roll(tokens[:, :, :size], 1, axis=1))
    return taught.replace(student=taught.student.replace(tokens_BT=moved))
