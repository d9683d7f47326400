"""Context distillation around its objective: answers of a teacher or of the student, and stored predictions."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeAlias

import jax
import ml_dtypes
import numpy as np

from lmlab.core.errors import check
from lmlab.core.types import AnswerBatch, Key, Params, TopK
from lmlab.data.distillation import DistillationRows, Example, distillation_of, with_stored
from lmlab.data.progress import counting
from lmlab.data.top_k import StoredTeacher
from lmlab.inference.config import SamplingConfig
from lmlab.inference.sample import sample
from lmlab.models.lm import LM
from lmlab.objectives.distill import hidden_of_labels
from lmlab.objectives.divergence import top_k
from lmlab.train.checkpoint import digests

Extract: TypeAlias = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray] | None]
"""`extract(completion) -> (scratch-pad, answer)`; None where it finds no answer."""


def whole(completion: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """All of a completion is the answer."""
    return (completion[:0], completion) if len(completion) else None


def after(marker: int) -> Extract:
    """The answer follows the last token `marker`, which the scratch-pad ends in."""

    def extract(completion: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        found = np.flatnonzero(completion == marker)
        cut = int(found[-1]) + 1 if len(found) else len(completion)
        return (completion[:cut], completion[cut:]) if cut < len(completion) else None

    return extract


def teacher_answers(
    lm: LM, params: Params, examples: Sequence[Example], key: Key, config: SamplingConfig, *,
    extract: Extract = whole, end_ids: tuple[int, ...] = (), samples: int = 1, rows: int = 64,
) -> tuple[list[Example], dict[str, int]]:  # fmt: skip
    """The examples with answers that the teacher writes after their contexts, and counts of what was dropped.

    examples: their answers are not looked at. extract: cuts a completion into scratch-pad and answer. end_ids: tokens
    each of which ends a completion; the first is part of the answer of one that has ended. samples: completions of
    every example, whose prompt is read once. Raises `UserError` as `sample`.
    """
    prompts = [np.concatenate([x.context, x.inputs]) for x in examples]
    return _answered(lm, params, examples, prompts, key, config, extract, end_ids, samples, rows)


def student_answers(
    lm: LM, params: Params, examples: Sequence[Example], key: Key, config: SamplingConfig, *,
    end_ids: tuple[int, ...] = (), samples: int = 1, rows: int = 64,
) -> tuple[list[Example], dict[str, int]]:  # fmt: skip
    """The same with answers that the student writes without the context: on-policy (GKD, arXiv 2306.13649).

    The teacher reads them without a scratch-pad.
    """
    prompts = [np.concatenate([x.student_context, x.inputs]) for x in examples]
    return _answered(lm, params, examples, prompts, key, config, whole, end_ids, samples, rows)


def on_policy(
    teachers: Sequence[Example], students: Sequence[Example], share: float, rng: np.random.Generator
) -> list[Example]:  # fmt: skip
    """Of each pair one: the student's answer with probability `share` (lambda of GKD, algorithm 1), else the other."""
    check(0 <= share <= 1, "lambda", share, "a probability")
    check(len(teachers) == len(students), "examples", len(students), f"as many as of the teacher, {len(teachers)}")
    drawn = rng.random(len(teachers)) < share
    return [student if mine else teacher for teacher, student, mine in zip(teachers, students, drawn, strict=True)]


def _answered(
    lm: LM, params: Params, examples: Sequence[Example], prompts: list[np.ndarray], key: Key, config: SamplingConfig,
    extract: Extract, end_ids: tuple[int, ...], samples: int, rows: int,
) -> tuple[list[Example], dict[str, int]]:  # fmt: skip
    check(samples >= 1, "samples", samples, "at least 1")
    every = [i for i in range(len(examples)) for _ in range(samples)]
    drawn = sample(lm, params, [prompts[i] for i in every], key, config, end_ids=end_ids, rows=rows)
    found: list[Example] = []
    for i, completion in zip(every, drawn, strict=True):
        cut = extract(completion.tokens)
        if cut is None:
            continue
        ending = np.asarray(end_ids[:1] if completion.ended else (), np.int32)
        found.append(replace(examples[i], scratchpad=cut[0], answer=np.concatenate([cut[1], ending])))
    return found, {"answered": len(found), "without_answer": len(drawn) - len(found)}


def distinct(examples: Sequence[Example]) -> tuple[list[Example], dict[str, int]]:
    """The first example of each inputs and context, and how many were left out."""
    found: dict[tuple[bytes, ...], Example] = {}
    for x in examples:
        found.setdefault(tuple(part.tobytes() for part in (x.context, x.student_context, x.inputs)), x)
    kept = list(found.values())
    return kept, {"kept": len(kept), "duplicates": len(examples) - len(kept)}


def check_lengths(rows: DistillationRows, student: LM, teacher: LM) -> None:
    """Raises `UserError` for an example that the student or the teacher has no room for."""
    for example in rows.examples:
        for whose, size, lm in (("teacher", len(example.context) + example.teacher_size, teacher),
                                ("student", example.student_size, student)):  # fmt: skip
            check(size <= lm.max_length, example.where, f"{size} tokens for the {whose}",
                  f"at most its model.max_length = {lm.max_length}", "Drop it (fitting).")  # fmt: skip


@partial(jax.jit, static_argnums=(0, 1, 2))
def predictions(lm: LM, k: int, temperature: float, params: Params, answers: AnswerBatch) -> TopK:
    """The k most probable tokens at every label of a batch, float32."""
    hidden_BAD = hidden_of_labels(lm, params, answers)
    # A row at a time: logits of [A, V].
    return jax.lax.map(lambda hidden_AD: top_k(lm.logits(params, hidden_AD) / temperature, k), hidden_BAD)


def store_predictions(
    rows: DistillationRows, lm: LM, params: Params, k: int, *, temperature: float = 1.0, batch_size: int = 8
) -> DistillationRows:  # fmt: skip
    """The rows with what the teacher says of every label, in bfloat16: 6 k + 2 bytes a label, and no teacher later."""
    check(1 <= k <= lm.vocab_size, "k", k, f"from 1 to {lm.vocab_size}, the size of the vocabulary")
    check_lengths(rows, lm, lm)
    offsets_N = np.cumsum([0, *(len(example.answer) for example in rows.examples)])
    logprobs_nK = np.zeros((offsets_N[-1], k + 1), ml_dtypes.bfloat16)
    ids_nK = np.zeros((offsets_N[-1], k), np.int32)
    with counting("storing the teacher's predictions") as tell:
        for start in range(0, rows.rows, batch_size):
            numbers = range(start, min(start + batch_size, rows.rows))
            batch = distillation_of(replace(rows, stored=None), numbers, batch_size)
            told = jax.device_get(predictions(lm, k, temperature, params, batch.teacher))
            for b, number in enumerate(numbers):
                held = rows.order[rows.row_starts[number] : rows.row_starts[number + 1]]
                place = np.concatenate([np.arange(offsets_N[i], offsets_N[i + 1]) for i in held])
                logprobs_nK[place] = told.logprobs_BAK[b, : len(place)]
                ids_nK[place] = told.ids_BAK[b, : len(place)]
            done = rows.order[: rows.row_starts[numbers[-1] + 1]]
            tell(len(done), int(np.diff(offsets_N)[done].sum()))
    stored = StoredTeacher(offsets_N, logprobs_nK, ids_nK, temperature, teacher_fingerprint(params, rows, temperature))
    return with_stored(rows, stored)


def teacher_fingerprint(params: Params, rows: DistillationRows, temperature: float = 1.0) -> str:
    """Of a teacher, and of all that it reads."""
    found = hashlib.blake2b(repr((sorted(digests(params).items()), temperature)).encode(), digest_size=16)
    for example in rows.examples:
        for part in (example.context, example.inputs, example.scratchpad, example.answer):
            found.update(len(part).to_bytes(4, "little") + np.asarray(part, np.int32).tobytes())
    return found.hexdigest()
