"""Answers in two rows each: as a teacher reads them after a context, and as a student does without it."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import grain
import numpy as np

from lmlab.core.errors import check
from lmlab.core.types import AnswerBatch, Distillation
from lmlab.data.stream import Stream, host_rows, prefetched, seed_of
from lmlab.data.top_k import StoredTeacher

MULTIPLE = 8
"""The number of labels of a row is rounded up to this, so that data sets of nearly the same size share a program."""
NONE = np.zeros(0, np.int32)


@dataclass(frozen=True)
class Example:
    """An answer, tokens int32. Its parts are tokenised apart, so that no token crosses a border.

    The teacher reads context, inputs, scratch-pad and answer, the student its own context, inputs and answer.
    """

    where: str
    """What an error calls it."""
    context: np.ndarray
    inputs: np.ndarray
    """At least one token: something must come before the answer."""
    answer: np.ndarray
    scratchpad: np.ndarray = field(default_factory=lambda: NONE)
    student_context: np.ndarray = field(default_factory=lambda: NONE)
    weight: float = 1.0

    @property
    def teacher_size(self) -> int:
        """Tokens that the teacher reads after the context."""
        return len(self.inputs) + len(self.scratchpad) + len(self.answer)

    @property
    def student_size(self) -> int:
        """Tokens that the student reads."""
        return len(self.student_context) + len(self.inputs) + len(self.answer)


def split_prompts(teacher: np.ndarray, student: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two prompts as (context, student's context, inputs): inputs is all that both end in, as chats of one template do.

    Raises `UserError` where they end in different tokens.
    """
    shorter = min(len(teacher), len(student))
    different = np.flatnonzero(teacher[len(teacher) - shorter :] != student[len(student) - shorter :])
    size = shorter - (int(different[-1]) + 1 if len(different) else 0)
    check(size >= 1, "prompts", (teacher[-3:].tolist(), student[-3:].tolist()), "two prompts that end in one token")
    return teacher[: len(teacher) - size], student[: len(student) - size], teacher[len(teacher) - size :]


def fitting(
    examples: Sequence[Example], teacher_length: int, student_length: int
) -> tuple[list[Example], dict[str, int]]:
    """The examples that rows of these lengths can hold, and how many were dropped: too long, or without an answer."""
    kept: list[Example] = []
    counts = {"examples": 0, "dropped_long": 0, "dropped_empty": 0}
    for example in examples:
        if not len(example.answer):
            counts["dropped_empty"] += 1
        elif len(example.context) + example.teacher_size > teacher_length or example.student_size > student_length:
            counts["dropped_long"] += 1
        else:
            kept.append(example)
    counts["examples"] = len(kept)
    return kept, counts


@dataclass(frozen=True)
class DistillationRows:
    """How examples lie in rows; made by `lay_out_examples`. A row is a pure function of its number."""

    examples: Sequence[Example]
    row_starts: np.ndarray
    """[rows + 1] where each row begins in `order`."""
    order: np.ndarray
    """The examples, row by row."""
    teacher_length: int
    student_length: int
    shared: bool
    labels: int
    """A: labels of a row at most."""
    per_row: int
    """S: examples of a row at most."""
    stored: StoredTeacher | None = None
    """Predictions of a teacher for every example."""

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.row_starts) - 1


def lay_out_examples(
    examples: Sequence[Example], teacher_length: int, student_length: int, *, shared: bool = True, per_row: int = 0
) -> DistillationRows:  # fmt: skip
    """Examples in rows of so many tokens, in the order given, each where the one before it ended.

    shared: examples of a row have the same context, and the teacher reads it once a row; else each has a copy of it.
    per_row: examples of a row at most; 0: as many as there is room for.

    Raises:
        UserError: no examples, one without inputs or answer or longer than a row, or none that weighs anything.
    """
    check(len(examples) > 0, "examples", 0, "at least one", "Look at what was dropped, and why.")
    check(any(example.weight > 0 for example in examples), "weight", 0.0, "an example that weighs more than 0")
    groups: dict[bytes, list[int]] = {}
    for i, example in enumerate(examples):
        _check(example, teacher_length, student_length)
        groups.setdefault(example.context.astype(np.int32).tobytes() if shared else b"", []).append(i)
    rows = [row for group in groups.values() for row in _rows(examples, group, teacher_length, student_length, shared,
                                                              per_row)]  # fmt: skip
    labels = max(sum(len(examples[i].answer) for i in row) for row in rows)
    return DistillationRows(
        examples, np.cumsum([0, *map(len, rows)]), np.concatenate(rows), teacher_length, student_length, shared,
        labels=-(-labels // MULTIPLE) * MULTIPLE, per_row=max(map(len, rows)),
    )  # fmt: skip


def _check(example: Example, teacher_length: int, student_length: int) -> None:
    where = example.where
    check(len(example.answer) >= 1, where, "an empty answer", "an answer of at least one token", "Drop it (fitting).")
    check(len(example.inputs) >= 1, where, "no inputs", "at least one token before the answer",
          "Begin with the tokenizer's begin_ids.")  # fmt: skip
    check(example.weight >= 0, where, example.weight, "a weight of 0 or more")
    for whose, size, length in (("teacher", len(example.context) + example.teacher_size, teacher_length),
                                ("student", example.student_size, student_length)):  # fmt: skip
        check(size <= length, where, f"{size} tokens for the {whose}", f"at most {length}, the length of its rows",
              "Shorten the context, or drop the example (fitting).")  # fmt: skip


def _rows(
    examples: Sequence[Example], group: list[int], teacher_length: int, student_length: int, shared: bool, per_row: int
) -> list[list[int]]:  # fmt: skip
    rows: list[list[int]] = []
    teacher, student = teacher_length + 1, student_length + 1
    for i in group:
        example = examples[i]
        context = len(example.context)
        more = example.teacher_size + (0 if shared else context)
        full = bool(per_row) and bool(rows) and len(rows[-1]) == per_row
        if full or teacher + more > teacher_length or student + example.student_size > student_length:
            rows.append([])
            teacher, student = (context if shared else 0), 0
        rows[-1].append(i)
        teacher, student = teacher + more, student + example.student_size
    return rows


class _Side:
    """One side of a batch while it is filled."""

    def __init__(self, rows: DistillationRows, batch_size: int, length: int, branches: bool) -> None:
        self.tokens, self.segments, self.positions, self.branches = np.zeros((4, batch_size, length), np.int32)
        self.labels, self.places, self.answers = np.zeros((3, batch_size, rows.labels), np.int32)
        self.ends, self.has_branches = np.zeros((batch_size, rows.per_row), np.int32), branches

    def write(self, b: int, start: int, tokens: np.ndarray, segment: int, position: int, branch: int) -> int:
        """Put tokens into a row; returns where they end."""
        here = slice(start, start + len(tokens))
        self.tokens[b, here], self.segments[b, here], self.branches[b, here] = tokens, segment, branch
        self.positions[b, here] = position + np.arange(len(tokens))
        return here.stop

    def answer(self, b: int, number: int, label: slice, tokens: np.ndarray, stop: int) -> None:
        """Labels that were written up to `stop`: each is predicted from the place before its own."""
        self.labels[b, label], self.answers[b, label] = tokens, number + 1
        self.places[b, label] = stop - len(tokens) - 1 + np.arange(len(tokens))
        self.ends[b, number] = stop - 1

    def batch(self) -> AnswerBatch:
        """What was filled in, once each label has been found in its place."""
        after = np.take_along_axis(self.tokens, np.minimum(self.places + 1, self.tokens.shape[1] - 1), axis=1)
        if (after != self.labels)[self.answers != 0].any():
            raise AssertionError("a label does not stand after the place that predicts it")
        branches = self.branches if self.has_branches else None
        read: Any = (self.tokens, self.segments, self.positions, branches)
        scored: Any = (self.labels, self.places, self.answers, self.ends)
        return AnswerBatch(*read, *scored)


def distillation_of(rows: DistillationRows, numbers: Sequence[int], batch_size: int) -> Distillation:
    """The rows with these numbers as a batch of NumPy arrays; rows missing to `batch_size` are all padding.

    The teacher's rows are left out where its predictions are stored.
    """
    student = _Side(rows, batch_size, rows.student_length, branches=False)
    teacher = _Side(rows, batch_size, rows.teacher_length, branches=rows.shared)
    weights = np.zeros((batch_size, rows.labels), np.float32)
    stored = None if rows.stored is None else rows.stored.empty(batch_size, rows.labels)
    for b, number in enumerate(numbers):
        label, read, own = 0, 0, 0
        for s, index in enumerate(rows.order[rows.row_starts[number] : rows.row_starts[number + 1]]):
            example = rows.examples[index]
            segment = 1 if rows.shared else s + 1
            if s == 0 or not rows.shared:
                read = teacher.write(b, read, example.context, segment, 0, 0)
            mine = np.concatenate([example.inputs, example.scratchpad, example.answer])
            read = teacher.write(b, read, mine, segment, len(example.context), s + 1)
            mine = np.concatenate([example.student_context, example.inputs, example.answer])
            own = student.write(b, own, mine, s + 1, 0, 0)
            here = slice(label, label + len(example.answer))
            teacher.answer(b, s, here, example.answer, read)
            student.answer(b, s, here, example.answer, own)
            weights[b, here], label = example.weight, here.stop
            if stored is not None and rows.stored is not None:
                stored.logprobs_BAK[b, here], stored.ids_BAK[b, here] = rows.stored.of(int(index))
    return Distillation(student.batch(), None if stored else teacher.batch(), stored, weights)  # type: ignore[arg-type]


def distillation_stream(
    rows: DistillationRows, batch_size: int, *, seed: int = 0, prefetch: int = 2, host: int = 0, hosts: int = 1
) -> Stream:  # fmt: skip
    """Training batches: every row once in every epoch, in an order that is new each time.

    Arguments and errors as `train_stream`.
    """
    share = host_rows(batch_size, host, hosts)
    numbers = grain.MapDataset.range(rows.rows).shuffle(seed=seed_of(seed, "distillation", "rows")).repeat()

    def numbers_at(step: int) -> list[int]:
        begin = step * batch_size + share.start
        return [int(numbers[i]) for i in range(begin, begin + len(share))]

    def batch_at(step: int) -> Distillation:
        return distillation_of(rows, numbers_at(step), len(share))

    def documents_at(step: int) -> list[str]:
        held = (rows.order[rows.row_starts[number] : rows.row_starts[number + 1]] for number in numbers_at(step))
        return list(dict.fromkeys(rows.examples[i].where for row in held for i in row))

    tokens = sum(example.student_size for example in rows.examples)
    batches = lambda start=0, stop=None: prefetched(batch_at, start, stop, prefetch)
    return Stream(batch_at, documents_at, batches, rows=rows.rows, tokens=tokens, text_bytes=0)


def with_stored(rows: DistillationRows, stored: StoredTeacher) -> DistillationRows:
    """Rows whose labels have predictions of a teacher.

    Raises `UserError` where there are not as many for each answer as it has tokens; that they are those of these very
    examples `load_stored` sees to, by their fingerprint.
    """
    sizes = np.asarray([len(example.answer) for example in rows.examples])
    same = len(stored.offsets_N) == len(sizes) + 1 and (np.diff(stored.offsets_N) == sizes).all()
    check(bool(same), "stored", stored.fingerprint, "predictions for these examples", "Store them anew.")
    return replace(rows, stored=stored)
