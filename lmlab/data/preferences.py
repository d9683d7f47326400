"""Pairs of answers from files: records of the usual shapes, as tokens of prompts and of answers, each cut apart."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np

from lmlab.core.errors import UserError, check
from lmlab.data.chat import ChatTemplate, Messages, render
from lmlab.data.pairs_config import PairsConfig
from lmlab.data.progress import counting, say
from lmlab.data.tokenizers import TextTokenizer

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
"""What begins a turn in the dialogues of Anthropic's HH."""
_CONTEXTS = ("prompt", "messages", "conversation", "conversations", "instruction")
_NUMBERS = {"weight": 1.0, "margin": 0.0, "target": 1.0}
_DROPPED = ("dropped_equal", "dropped_long", "dropped_invalid")
_LOSSES = ("cut_prompts", "cut_answers", *_DROPPED)


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, the first of them preferred."""

    where: str
    """File and line."""
    prompt: str | tuple[Mapping[str, Any], ...]
    """A text, or the messages of a chat."""
    chosen: str
    rejected: str
    weight: float = 1.0
    margin: float = 0.0
    target: float = 1.0
    """The probability that the label is right."""


@dataclass(frozen=True)
class EncodedPair:
    """The same as int32 token ids; no token holds parts of both a prompt and an answer."""

    where: str
    prompt: np.ndarray
    answers: tuple[np.ndarray, np.ndarray]
    """The preferred one first; each ends with the token that ends a turn."""
    weight: float
    margin: float
    target: float = 1.0
    """The probability that the label is right."""


def read_pair(record: object, where: str) -> Pair:
    """The pair of a record of any of the shapes that `PairsConfig` names; answers may still be equal.

    Raises:
        UserError: another shape, an empty answer, a weight, margin or target out of range; `where` is named.
    """
    if not isinstance(record, dict):
        raise _wrong(where, f"a JSON object, not {type(record).__name__}")
    missing = [name for name in ("chosen", "rejected") if name not in record]
    if missing:
        raise _wrong(where, f"a record with chosen and rejected; there are {', '.join(record) or 'no fields'}")
    context = next((record[name] for name in _CONTEXTS if name in record), None)
    sides = record["chosen"], record["rejected"]
    if context is None:
        prompt, *answers = _common_prompt(*sides, where)
    else:
        prompt = _prompt(context, record.get("input") or "", where)
        answers = [_answer(side, where) for side in sides]
    for name, answer in zip(("chosen", "rejected"), answers, strict=True):
        if not answer.strip():
            raise _wrong(where, f"an answer that is not empty in {name}")
    numbers = (_number(record, name, default, where) for name, default in _NUMBERS.items())
    return Pair(where, prompt, answers[0], answers[1], *numbers)


def prompt_key(record: object) -> str:
    """What pairs of one prompt have in common; of what is no pair, all of it."""
    try:
        return json.dumps(read_pair(record, "").prompt)
    except UserError:
        return json.dumps(record, sort_keys=True)


def _prompt(context: Any, more: Any, where: str) -> str | tuple[Mapping[str, Any], ...]:
    if isinstance(context, str) and isinstance(more, str):
        return f"{context}\n\n{more}" if more else context
    if _are_messages(context):
        return tuple({"role": message["role"], "content": message["content"]} for message in context)
    raise _wrong(where, "a prompt that is text, or messages of {role, content}")


def _answer(side: Any, where: str) -> str:
    if isinstance(side, dict):
        side = [side]
    if _are_messages(side) and len(side) == 1:
        side = side[0]["content"]
    if not isinstance(side, str):
        raise _wrong(where, "answers that are texts, or one message of the assistant each, beside a prompt")
    return side


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
        for message in value
    )


def _common_prompt(chosen: Any, rejected: Any, where: str) -> tuple[Any, str, str]:
    """Prompt and answers of two dialogues that differ in the last turn alone."""
    if isinstance(chosen, str) and isinstance(rejected, str):
        cuts = [text.rfind(ASSISTANT) + len(ASSISTANT) for text in (chosen, rejected)]
        prompts = [text[:cut] for text, cut in zip((chosen, rejected), cuts, strict=True)]
        if prompts[0] != prompts[1] or min(cuts) < len(ASSISTANT):
            raise _wrong(where, f"a prompt, or dialogues that are alike up to their last {ASSISTANT.strip()!r}")
        return prompts[0], chosen[cuts[0] :], rejected[cuts[1] :]
    if not (_are_messages(chosen) and _are_messages(rejected) and len(chosen) > 1):
        raise _wrong(where, "a prompt, or two dialogues of messages")
    if chosen[:-1] != rejected[:-1]:
        raise _wrong(where, "dialogues that are alike up to their last message")
    return _prompt(chosen[:-1], "", where), chosen[-1]["content"], rejected[-1]["content"]


def _number(record: Mapping[str, Any], name: str, default: float, where: str) -> float:
    value = record.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _wrong(where, f"a number as {name}, not {value!r}")
    if name == "weight" and value < 0:
        raise _wrong(where, f"a weight of 0 or more, not {value}")
    if name == "target" and not 0 <= value <= 1:
        raise _wrong(where, f"a target between 0 and 1, not {value}")
    return float(value)


def _wrong(where: str, expected: str) -> UserError:
    return UserError("data.train", where, expected, 'Mend the file, or set invalid to "drop".')


def encode_pairs(
    records: Iterable[tuple[str, object]], config: PairsConfig, tokenizer: TextTokenizer,
    template: ChatTemplate | None, *, label: str = "pairs",
) -> tuple[list[EncodedPair], dict[str, int]]:  # fmt: skip
    """Pairs as tokens, and counts of what was kept, cut and dropped.

    Args:
        records: where each stands, and the value of its line.
        config: rules for what is too long or no pair, and the length of rows.
        tokenizer: of the model.
        template: how its chats are written; None: prompts are texts that answers follow as they stand.
        label: how messages call these pairs.

    Raises:
        UserError: see `read_pair`; a chat without a template; no pair is left.
    """
    pairs: list[EncodedPair] = []
    counts = dict.fromkeys(("pairs", "tokens", *_LOSSES), 0)
    now = datetime.fromisoformat(config.date)
    with counting(f"tokenising {label}") as tell:
        for where, record in records:
            try:
                pair = read_pair(record, where)
                same = pair.chosen.strip() == pair.rejected.strip()
                encoded = None if same else _encode(pair, tokenizer, template, now)
            except UserError:
                if config.invalid == "error":
                    raise
                counts["dropped_invalid"] += 1
                continue
            if encoded is None:
                counts["dropped_equal"] += 1
                continue
            fitted = _fit(encoded, config, counts)
            if fitted is not None:
                pairs.append(fitted)
                counts["tokens"] += len(fitted.prompt) + sum(map(len, fitted.answers))
                tell(len(pairs), counts["tokens"])
    counts["pairs"] = len(pairs)
    dropped = sum(counts[name] for name in _DROPPED)
    check(bool(pairs), "data.train", config.train, f"at least one pair in {label}",
          f"{dropped} pairs were dropped." if dropped else "There is none.")  # fmt: skip
    lost = [f"{counts[name]} {name.replace('_', ' as ' if name in _DROPPED else ' ')}" for name in _LOSSES
            if counts[name]]  # fmt: skip
    if lost:
        say(f"{label}: of the pairs {', '.join(lost)}")
    return pairs, counts


def _encode(pair: Pair, tokenizer: TextTokenizer, template: ChatTemplate | None, now: datetime) -> EncodedPair:
    """Prompt and answers, tokenised apart."""
    if template is None:
        if not isinstance(pair.prompt, str):
            raise UserError("template", pair.where, "a model with a chat template, since the prompt is a chat",
                            "Give one: --template FILE.")  # fmt: skip
        end = [tokenizer.end_id]
        encode = lambda text, tail: np.asarray([*tokenizer.encode_batch([text])[0], *tail], np.int32)
        begin = np.asarray(tokenizer.begin_ids, np.int32)
        prompt = np.concatenate([begin, encode(pair.prompt, ())])
        answers = encode(pair.chosen, end), encode(pair.rejected, end)
    else:
        messages = dialogue(pair.prompt) if isinstance(pair.prompt, str) else list(pair.prompt)
        text = render(template, messages, add_generation_prompt=True, now=now)
        prompt = tokenizer.encode_marked(text)[0]
        answers = (
            _encode_answer(template, tokenizer, messages, text, pair.chosen.strip(), now),
            _encode_answer(template, tokenizer, messages, text, pair.rejected.strip(), now),
        )
    if not len(prompt):
        raise _wrong(pair.where, "a prompt of at least one token")
    return EncodedPair(pair.where, prompt, answers, pair.weight, pair.margin, pair.target)


def _encode_answer(
    template: ChatTemplate, tokenizer: TextTokenizer, messages: Messages, prompt: str, answer: str, now: datetime
) -> np.ndarray:  # fmt: skip
    """What the chat has more with the answer, up to the token that ends the turn."""
    whole = render(template, [*messages, {"role": "assistant", "content": answer}], now=now)
    if not whole.startswith(prompt):
        raise UserError("chat_template", f"{template.source[:40]}...", "a prompt to be written as in the answered chat")
    ids_T, places_T2 = tokenizer.encode_marked(whole[len(prompt) :])
    special = np.flatnonzero(tokenizer.token_bytes_V[ids_T] == 0)
    # Blanks after the token that ends the turn are the template's.
    if len(special) and not whole[len(prompt) + places_T2[special[-1], 1] :].strip():
        ids_T = ids_T[: special[-1] + 1]
    return ids_T


def dialogue(text: str) -> list[dict[str, str]]:
    """The messages of a prompt: those of an HH dialogue, or else one of the user."""
    if not text.startswith(HUMAN):
        return [{"role": "user", "content": text}]
    messages = []
    for part in text.split(HUMAN)[1:]:
        question, *answers = part.split(ASSISTANT)
        messages.append({"role": "user", "content": question.strip()})
        messages += [{"role": "assistant", "content": answer.strip()} for answer in answers if answer.strip()]
    return messages


def _fit(pair: EncodedPair, config: PairsConfig, counts: dict[str, int]) -> EncodedPair | None:
    """The pair as it goes into a row of `config.length` tokens; None: it does not, and is counted."""
    copies = 2 if config.layout == "apart" else 1
    sizes = [len(answer) for answer in pair.answers]
    # At least one token of the prompt has to stay: the first of an answer is predicted from it.
    room = config.length - copies
    if sum(sizes) > room:
        if config.too_long == "drop":
            counts["dropped_long"] += 1
            return None
        # Half of the room each, and what the shorter one leaves for the longer one.
        limit = max(room // 2, room - min(sizes))
        answers = pair.answers[0][:limit], pair.answers[1][:limit]
        counts["cut_answers"] += 1
        if np.array_equal(*answers):
            counts["dropped_long"] += 1
            return None
        pair = EncodedPair(pair.where, pair.prompt, answers, pair.weight, pair.margin, pair.target)
    kept = (config.length - sum(map(len, pair.answers))) // copies
    if len(pair.prompt) > kept:
        counts["cut_prompts"] += 1
        pair = EncodedPair(pair.where, pair.prompt[-kept:], pair.answers, pair.weight, pair.margin, pair.target)
    return pair
