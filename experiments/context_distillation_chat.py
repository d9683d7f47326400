"""A system prompt distilled into a real model: how much of its gain in log-likelihood is kept without it?"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.results import say
from lmlab.adapters import adapted, add_adapters, moving_axes, still_parts
from lmlab.core.errors import UserError, check
from lmlab.core.types import Objective, Params
from lmlab.data.chat import encode_chat_prompt
from lmlab.data.config import Files
from lmlab.data.distillation import DistillationRows, Example, distillation_of, fitting, lay_out_examples, split_prompts
from lmlab.data.files import read_records
from lmlab.distillation import check_lengths, store_predictions, student_answers, teacher_answers
from lmlab.inference.config import SamplingConfig
from lmlab.interop.pretrained import Pretrained, load_pretrained
from lmlab.models.lm import LM
from lmlab.objectives.distill import distill, hard_labels, under_adapters
from lmlab.objectives.next_token import next_token
from lmlab.optim.chain import build_optimizer
from lmlab.optim.config import LoraConfig, OptimConfig, ScheduleConfig
from lmlab.train.state import new_state
from lmlab.train.step import make_evaluation, make_step, ratio_value

PERSONA = "You are an old pirate captain. Answer in the voice of a pirate, in one or two short sentences."
LORA = LoraConfig(rank=8)
ROW = 4
"""Examples of a row, which the teacher reads after one copy of the context."""


@dataclass(frozen=True)
class Chat:
    """How much of everything."""

    model: str
    prompts: str
    persona: str
    steps: int
    train: int
    held_out: int
    answer: int = 32
    longest: int = 40
    """Tokens of an answer, and of a prompt."""
    rows: int = 2
    peak: float = 2e-3


def run_chat(chat: Chat) -> dict[str, Any]:
    """Nats a token of the teacher's held-out answers: with the prompt, without, and after each arm."""
    began = time.perf_counter()
    model = load_pretrained(Path(chat.model))
    if model.text is None or model.text.chat is None:
        raise UserError("--model", chat.model, "a model with a chat template")
    lm, base = model.lm, model.params
    asked, gold = _examples(chat, model)
    say(f"chat: {len(asked)} prompts; the teacher answers")
    config, ends = SamplingConfig(max_new_tokens=chat.answer), model.text.tokenizer.end_ids
    taught, counts = teacher_answers(lm, base, asked, jax.random.key(0), config, end_ids=ends)
    heldout = {x.where for x in asked[: chat.held_out]}
    pick = lambda some, held: [x for x in some if (x.where in heldout) == held]
    say("chat: the student answers without the prompt")
    own, _ = student_answers(lm, base, pick(asked, False), jax.random.key(1), config, end_ids=ends)
    rows = {name: _laid_out(some) for name, some in (("taught", pick(taught, False)), ("held out", pick(taught, True)),
                                                     ("own", own), ("gold", pick(gold, True)))}  # fmt: skip
    for data in rows.values():
        check_lengths(data, lm, lm)
    say("chat: the teacher's predictions")
    k = 64
    stored = store_predictions(rows["taught"], lm, base, k, batch_size=chat.rows)
    student = adapted(lm, LORA)
    start = add_adapters(lm, LORA, base, jax.random.key(0))
    look = _look(student, lm, rows["held out"], rows["gold"], chat.rows)
    floor = look(start)
    ceiling = _ceiling(student, lm, start, rows["held out"], chat.rows)
    result: dict[str, Any] = {
        "model": Path(chat.model).name, "persona": chat.persona, "counts": counts, "floor": floor, "ceiling": ceiling,
        "arms": {}, "k": k,
    }  # fmt: skip
    for name, objective, data, hard in (
        (f"distilled, top {k}", distill(student, teacher=under_adapters(lm)), stored, False),
        ("control: no teacher", next_token(student), rows["own"], True),
    ):
        say(f"chat: {name}")
        params = _trained(student, lm, objective, start, data, chat, hard)
        after = look(params)
        gain = floor["nll"] - ceiling
        result["arms"][name] = after | {"recovery": (floor["nll"] - after["nll"]) / gain}
        text = student_answers(student, params, pick(asked, True)[:3], jax.random.key(2), config, end_ids=ends)[0]
        result["arms"][name]["texts"] = [model.text.tokenizer.decode(x.answer) for x in text]
    result["seconds"] = round(time.perf_counter() - began)
    return result


def _examples(chat: Chat, model: Pretrained) -> tuple[list[Example], list[Example]]:
    """Prompts with the persona as context, held-out ones first; and the same with the answers of the file."""
    text = model.text
    assert text is not None
    assert text.chat is not None
    asked: list[Example] = []
    golden: dict[str, np.ndarray] = {}
    seen: set[bytes] = set()
    nothing = np.zeros(0, np.int32)
    path = Path(chat.prompts)
    for where, record in read_records(Files(chat.prompts), [(path.name, path)]):
        if len(asked) == chat.train + chat.held_out:
            break
        words, answer = _words(record, where)
        user = {"role": "user", "content": words}
        prompts = [encode_chat_prompt(text.chat, text.tokenizer, messages)
                   for messages in ([{"role": "system", "content": chat.persona}, user], [user])]  # fmt: skip
        context, own, inputs = split_prompts(*prompts)
        if len(inputs) <= chat.longest and inputs.tobytes() not in seen:
            seen.add(inputs.tobytes())
            asked.append(Example(where, context, inputs, nothing, student_context=own))
            golden[where] = text.tokenizer.encode_batch([answer])[0][: chat.answer]
    check(len(asked) == chat.train + chat.held_out, "--prompts", len(asked),
          f"{chat.train + chat.held_out} different prompts of at most {chat.longest} tokens")  # fmt: skip
    gold = [replace(x, answer=golden[x.where]) for x in asked if len(golden[x.where])]
    measured = any(len(golden[x.where]) for x in asked[: chat.held_out])
    check(
        measured, "--prompts", chat.prompts, f'an "output" in one of the first {chat.held_out} records, for the drift'
    )
    return asked, gold


def _words(record: object, where: str) -> tuple[str, str]:
    """What the user says, and the answer of the file, which may be empty."""
    named = isinstance(record, dict) and bool(record.get("instruction"))
    fields = [record.get(name, "") if isinstance(record, dict) else "" for name in ("instruction", "input", "output")]
    if not named or not all(isinstance(field, str) for field in fields):
        raise UserError(
            "--prompts", where, 'a record with texts in "instruction" and, if they are there, "input", "output"'
        )
    return "\n".join(part for part in fields[:2] if part), fields[2]


def _laid_out(examples: Sequence[Example]) -> DistillationRows:
    """Rows of ROW examples, as long as they have to be."""
    round_up = lambda n: -(-n // 32) * 32
    context = max(len(x.context) for x in examples)
    kept, _ = fitting(examples, 10**6, 10**6)
    teacher = round_up(context + ROW * max(x.teacher_size for x in kept))
    return lay_out_examples(kept, teacher, round_up(ROW * max(x.student_size for x in kept)), per_row=ROW)


def _look(student: LM, base: LM, heldout: DistillationRows, gold: DistillationRows, rows: int) -> Any:
    """`look(params)`: nats a token of the teacher's answers and of the file's, both without the context."""
    evaluation = jax.jit(make_evaluation(distill(student, teacher=under_adapters(base))))

    def mean(params: Params, data: DistillationRows) -> dict[str, float]:
        return _mean(evaluation, params, [distillation_of(data, n, rows) for n in _batches(data.rows, rows)])

    def look(params: Params) -> dict[str, float]:
        told = mean(params, heldout)
        return {
            "nll": told["nll"],
            "kl": told["kl"],
            "agreement": told["agreement"],
            "drift": mean(params, gold)["nll"],
        }

    return look


def _ceiling(student: LM, base: LM, params: Params, heldout: DistillationRows, rows: int) -> float:
    """The same of the teacher itself: the student reads what it reads."""
    evaluation = jax.jit(make_evaluation(distill(student, teacher=under_adapters(base))))
    batches = [distillation_of(heldout, n, rows) for n in _batches(heldout.rows, rows)]
    return _mean(evaluation, params, [batch.replace(student=batch.teacher) for batch in batches])["nll"]


def _mean(evaluation: Any, params: Params, batches: Sequence[Any]) -> dict[str, float]:
    found = [evaluation(params, batch, jax.random.key(0)) for batch in batches]
    total = jax.tree.map(lambda *x: sum(x), *[{"kl": terms.losses["divergence"], **terms.metrics} for terms in found])
    return {name: float(ratio_value(ratio)) for name, ratio in total.items()}


def _batches(count: int, rows: int) -> list[range]:
    return [range(start, min(start + rows, count)) for start in range(0, count, rows)]


def _trained(
    student: LM, base: LM, objective: Objective, params: Params, data: DistillationRows, chat: Chat, hard: bool
) -> Params:  # fmt: skip
    """Parameters after the steps; rows in an order that is new in every epoch."""
    schedule = ScheduleConfig(peak=chat.peak, warmup=0.1, end=0.1)
    tx = build_optimizer(OptimConfig(schedule=schedule, weight_decay=0.0), moving_axes(base, student, LORA), chat.steps)
    state = new_state(params, tx, jax.random.key(0), still=still_parts(base, LORA))
    step = jax.jit(make_step(objective, tx))
    rng = np.random.default_rng(0)
    epochs = math.ceil(chat.steps * chat.rows / data.rows)
    order = np.concatenate([rng.permutation(data.rows) for _ in range(epochs)]).tolist()
    for i in range(chat.steps):
        batch = distillation_of(data, order[i * chat.rows : (i + 1) * chat.rows], chat.rows)
        state, told = step(state, hard_labels(batch) if hard else batch)
        if i % 10 == 0 or i == chat.steps - 1:
            say(f"  step {i}: {float(told['loss']):.3f}")
    return state.params
