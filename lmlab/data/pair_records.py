"""Pairs of answers as records of files have them, in all the usual shapes."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lmlab.core.errors import UserError

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
"""What begins a turn in the dialogues of Anthropic's HH."""
_CONTEXTS = ("prompt", "messages", "conversation", "conversations", "instruction")
_NUMBERS = {"weight": 1.0, "margin": 0.0, "target": 1.0}
"""What may stand beside a pair, with what is meant where it does not."""


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


def read_pair(record: object, where: str) -> Pair:
    """The pair of a record of any of the shapes that `PairsConfig` names; answers may still be equal.

    Raises:
        UserError: another shape, an empty answer, a weight, margin or target out of range; `where` is named.
    """
    if not isinstance(record, dict):
        raise wrong(where, f"a JSON object, not {type(record).__name__}")
    missing = [name for name in ("chosen", "rejected") if name not in record]
    if missing:
        raise wrong(where, f"a record with chosen and rejected; there are {', '.join(record) or 'no fields'}")
    context = next((record[name] for name in _CONTEXTS if name in record), None)
    sides = record["chosen"], record["rejected"]
    if context is None or all(_are_messages(side) and len(side) > 1 for side in sides):
        prompt, *answers = _common_prompt(*sides, where)
    else:
        prompt = _prompt(context, record.get("input") or "", where)
        answers = [_answer(side, prompt, where) for side in sides]
    for name, answer in zip(("chosen", "rejected"), answers, strict=True):
        if not answer.strip():
            raise wrong(where, f"an answer that is not empty in {name}")
        if isinstance(prompt, str) and prompt.startswith(HUMAN) and HUMAN in answer:
            raise wrong(where, f"one turn in {name}: there is another {HUMAN.strip()!r} in it")
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
    if _are_messages(context) and context:
        return tuple({"role": message["role"], "content": message["content"]} for message in context)
    raise wrong(where, "a prompt that is text, or messages of {role, content}")


def _answer(side: Any, prompt: Any, where: str) -> str:
    if isinstance(side, dict):
        side = [side]
    if _are_messages(side) and len(side) == 1:
        side = _said(side[0], where)
    if not isinstance(side, str):
        raise wrong(where, "answers that are texts, or one message of the assistant each, beside a prompt")
    # Some files of HH have the prompt in both places.
    whole = isinstance(prompt, str) and prompt.startswith(HUMAN) and side.startswith(prompt)
    return side[len(prompt) :] if whole else side


def _said(message: Mapping[str, Any], where: str) -> str:
    if message["role"] != "assistant":
        raise wrong(where, f"answers of the assistant, not of {message['role']!r}")
    return message["content"]


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
            raise wrong(where, f"a prompt, or dialogues that are alike up to their last {ASSISTANT.strip()!r}")
        return prompts[0], chosen[cuts[0] :], rejected[cuts[1] :]
    if not (_are_messages(chosen) and _are_messages(rejected) and len(chosen) > 1):
        raise wrong(where, "a prompt, or two dialogues of messages")
    if chosen[:-1] != rejected[:-1]:
        raise wrong(where, "dialogues that are alike up to their last message")
    return _prompt(chosen[:-1], "", where), _said(chosen[-1], where), _said(rejected[-1], where)


def _number(record: Mapping[str, Any], name: str, default: float, where: str) -> float:
    value = record.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise wrong(where, f"a number as {name}, not {value!r}")
    if name == "weight" and value < 0:
        raise wrong(where, f"a weight of 0 or more, not {value}")
    if name == "target" and not 0 <= value <= 1:
        raise wrong(where, f"a target between 0 and 1, not {value}")
    return float(value)


def wrong(where: str, expected: str) -> UserError:
    """What is to be said of a line that is no pair."""
    return UserError("data.train", where, expected, 'Mend the file, or set invalid to "drop".')


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
