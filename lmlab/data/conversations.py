"""Conversations to learn from: records of the usual shapes, as tokens with a mask of what the assistant wrote."""

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from functools import partial
from typing import Any

import numpy as np

from lmlab.core.errors import UserError, check
from lmlab.data.cache import TokenCache
from lmlab.data.chat import ChatTemplate, encode_chat
from lmlab.data.config import ConversationsConfig
from lmlab.data.files import file_records
from lmlab.data.open import Data
from lmlab.data.progress import counting, say
from lmlab.data.sources import Split
from lmlab.data.stream import heldout_batches, train_stream
from lmlab.data.tokenizers import TextTokenizer

ROLES = ("system", "user", "assistant", "tool")
_SHAPES = (
    ("prompt", "", "completion"), ("instruction", "input", "output"), ("instruction", "context", "response"),
)  # fmt: skip
"""What the user writes, what may follow it, and the answer."""
_LOSSES = ("truncated", "dropped_long", "dropped_invalid")


def open_conversations(
    config: ConversationsConfig, tokenizer: TextTokenizer, template: ChatTemplate, *, lookahead: int = 1, host: int = 0,
    hosts: int = 1,
) -> Data:  # fmt: skip
    """Read, render, tokenise and pack conversations; a conversation is a segment, and lies in one row.

    Args:
        config: what to read, and how rows are made of it.
        tokenizer: of the model.
        template: how the model's chats are written.
        lookahead: n, tokens beyond T in a row.
        host: which host this is; gets its part of each batch.
        hosts: number of hosts.

    Raises:
        UserError: a line that is no conversation (file and line are named), a template that fails, nothing to learn.
    """
    splits: tuple[Split, ...] = ("train", "heldout")
    summary: dict[str, int | str] = {"vocab_size": tokenizer.vocab_size, "tokenizer": tokenizer.fingerprint}
    caches = {}
    for split in splits:
        records = file_records(config.stream_config().sources["conversations"], split)  # type: ignore[arg-type]
        cache, counts = encode_conversations(records, config, tokenizer, template, lookahead=lookahead, label=split)
        caches[split] = {"conversations": cache}
        summary |= {f"conversations/{split}/{name}": count for name, count in counts.items()}
    stream = config.stream_config()
    return Data(
        tokenizer=tokenizer,
        train=train_stream(stream, caches["train"], lookahead=lookahead, host=host, hosts=hosts),
        heldout=partial(heldout_batches, stream, caches["heldout"], lookahead=lookahead, host=host, hosts=hosts),
        texts=lambda split: _texts(caches[split]["conversations"], tokenizer),
        caches=caches,
        orders={},
        summary=summary,
    )


def encode_conversations(
    records: Iterable[tuple[str, object]], config: ConversationsConfig, tokenizer: TextTokenizer,
    template: ChatTemplate, *, lookahead: int = 1, label: str = "conversations",
) -> tuple[TokenCache, dict[str, int]]:  # fmt: skip
    """Conversations as tokens with labels, and counts of what was kept, cut and dropped.

    Args:
        records: where each stands, and the value of its line.
        config: rules for what is too long or no conversation, and the length of rows.
        tokenizer: of the model.
        template: how its chats are written.
        lookahead: n, tokens beyond T in a row.
        label: how messages call these conversations.

    Raises:
        UserError: see `open_conversations`.
    """
    width, now = config.length + lookahead, datetime.fromisoformat(config.date)
    encode = partial(encode_chat, template, tokenizer, turns=config.turns, now=now)
    names, ends, text_bytes = [], array("q", [0]), 0
    tokens, labels = array("i"), bytearray()
    counts = dict.fromkeys(("conversations", "tokens", "labels", *_LOSSES), 0)
    with counting(f"tokenising {label}") as tell:
        for where, record in records:
            encoded = _encode(record, where, config, encode)
            if encoded is None:
                counts["dropped_invalid"] += 1
                continue
            tokens_T, mask_T = encoded[0][:width], encoded[1][:width]
            cut = len(encoded[0]) > width
            # A segment's first token is predicted from nothing: it is no label.
            if cut and (config.too_long == "drop" or not mask_T[1:].any()):
                counts["dropped_long"] += 1
                continue
            counts["truncated"] += cut
            names.append(where)
            tokens.frombytes(tokens_T.astype(np.int32).tobytes())
            labels += mask_T.tobytes()
            ends.append(len(tokens))
            text_bytes += int(tokenizer.token_bytes_V[tokens_T].sum())
            tell(len(names), len(tokens))
    counts |= {"conversations": len(names), "tokens": len(tokens), "labels": sum(labels)}
    _report(label, counts, config)
    arrays = np.frombuffer(tokens, np.int32), np.frombuffer(bytes(labels), bool)
    digest = hashlib.blake2b(b"".join(part.tobytes() for part in arrays), digest_size=10).hexdigest()
    return TokenCache(arrays[0], np.asarray(ends), names.__getitem__, text_bytes, digest, arrays[1]), counts


def conversation(record: object, where: str) -> list[dict[str, Any]]:
    """The messages of a record of any of the shapes that `ConversationsConfig` names.

    Raises:
        UserError: another shape, an unknown role, text that is none, no answer; `where` is named.
    """
    if not isinstance(record, dict):
        raise _wrong(where, f"a JSON object, not {type(record).__name__}")
    messages = record.get("messages")
    if messages is None:
        messages = _from_fields(record, where)
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise _wrong(where, "messages that are a list of {role, content}")
    for number, message in enumerate(messages, start=1):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise _wrong(where, f"roles of {', '.join(ROLES)}; message {number} has {role!r}")
        if not isinstance(content, str):
            raise _wrong(where, f"text as the content of message {number}, not {type(content).__name__}")
    if not any(message["role"] == "assistant" for message in messages):
        raise _wrong(where, "a message of the assistant")
    return messages


def _from_fields(record: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    for ask, more, answer in _SHAPES:
        if ask in record and answer in record:
            asked, added = record[ask], record.get(more) or ""
            if isinstance(asked, list) and isinstance(record[answer], list):
                return asked + record[answer]
            if not isinstance(asked, str) or not isinstance(added, str):
                raise _wrong(where, f"text in {ask}{' and ' if more else ''}{more}")
            question = f"{asked}\n\n{added}" if added else asked
            return [{"role": "user", "content": question}, {"role": "assistant", "content": record[answer]}]
    shapes = "; ".join(f"{ask} and {answer}" for ask, _, answer in _SHAPES)
    raise _wrong(where, f"a record with messages, or with {shapes}; there are {', '.join(record) or 'no fields'}")


def _wrong(where: str, expected: str) -> UserError:
    return UserError("data.train", where, expected, 'Mend the file, or set invalid to "drop".')


def _encode(
    record: object, where: str, config: ConversationsConfig,
    encode: Callable[[list[dict[str, Any]]], tuple[np.ndarray, np.ndarray]],
) -> tuple[np.ndarray, np.ndarray] | None:  # fmt: skip
    """Ids and mask; None for a line that is to be dropped."""
    try:
        messages = conversation(record, where)
        try:
            return encode(messages)
        except UserError as error:
            raise UserError(f"{error.field} for {where}", error.value, error.expected, error.remedy) from error
    except UserError:
        if config.invalid == "drop":
            return None
        raise


def _report(label: str, counts: Mapping[str, int], config: ConversationsConfig) -> None:
    dropped = counts["dropped_long"] + counts["dropped_invalid"]
    check(
        counts["labels"] > 0, "data.train", config.train, f"at least one answer to learn in {label}",
        f"{dropped} conversations were dropped." if dropped else "There is no conversation.",
    )  # fmt: skip
    lost = [f"{counts[name]} {name.replace('_', ' as ')}" for name in _LOSSES if counts[name]]
    if lost:
        say(f"{label}: of the conversations {', '.join(lost)}")


def _texts(cache: TokenCache, tokenizer: TextTokenizer) -> Iterator[str]:
    return (
        tokenizer.decode(cache.tokens_N[begin:end])
        for begin, end in zip(cache.offsets, cache.offsets[1:], strict=False)
    )
