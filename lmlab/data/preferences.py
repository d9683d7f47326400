"""Pairs of answers as tokens of prompts and of answers, each cut apart, in the room that there is."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

import numpy as np

from lmlab.core.errors import UserError, check
from lmlab.data.chat import ChatTemplate, Messages, render
from lmlab.data.pair_records import Pair, dialogue, read_pair, wrong
from lmlab.data.pairs_config import PairsConfig
from lmlab.data.progress import counting, say
from lmlab.data.tokenizers import TextTokenizer

_DROPPED = ("dropped_equal", "dropped_long", "dropped_invalid")
_LOSSES = ("cut_prompts", "cut_answers", *_DROPPED)


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
        raise wrong(pair.where, "a prompt of at least one token")
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
