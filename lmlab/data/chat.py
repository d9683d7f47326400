"""Chats as text: the Jinja templates that tokenizers ship, and which tokens of a chat the assistant wrote."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any, Literal, TypeAlias

import jinja2
import numpy as np
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from lmlab.core.errors import UserError, check
from lmlab.data.tokenizers import TextTokenizer

Messages: TypeAlias = Sequence[Mapping[str, Any]]
"""A chat: `{"role", "content"}` each, and whatever else its template reads."""
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
"""Marks around what `{% generation %}` encloses: Unicode keeps these two out of all text (noncharacters)."""


@dataclass(frozen=True)
class ChatTemplate:
    """How chats with one model are written, as its tokenizer says."""

    source: str
    """The Jinja text (`chat_template`)."""
    specials: Mapping[str, Any]
    """Names that the text may use: `bos_token`, `eos_token`, ... as in tokenizer_config.json; options of the template
    (`enable_thinking`) may be added."""


def render(
    template: ChatTemplate, messages: Messages, *, add_generation_prompt: bool = False, now: datetime | None = None
) -> str:  # fmt: skip
    """A chat as text, special tokens spelled out; the same text that transformers renders.

    Args:
        template: how.
        messages: what.
        add_generation_prompt: end with what comes before an answer.
        now: the time that a template which asks for it is told; None: the clock's.

    Raises:
        UserError: the template is not Jinja, or raises; the message is the template's.
    """
    text, _ = _render_marked(template, messages, add_generation_prompt, now)
    return text


def encode_chat_prompt(template: ChatTemplate, tokenizer: TextTokenizer, messages: Messages) -> np.ndarray:
    """A chat up to where the assistant is to answer, int32 ids [T]. Raises `UserError` as `render`."""
    return tokenizer.encode_marked(render(template, messages, add_generation_prompt=True))[0]


def encode_chat(
    template: ChatTemplate, tokenizer: TextTokenizer, messages: Messages, *, turns: Literal["all", "last"] = "all",
    now: datetime | None = None,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """A chat as int32 ids [T], and bool [T] which of them the assistant wrote.

    Those are the tokens inside `{% generation %}` where the template has that tag. Elsewhere they are, for each of the
    assistant's messages, what the chat up to it has more than the prompt for it: the content and the token that ends
    the turn; blanks after that token are the template's.

    Args:
        template: how the chat is written.
        tokenizer: reads the special tokens that the template spells, and those that a message spells.
        messages: the chat; without an assistant's message nothing is marked.
        turns: mark all of the assistant's messages, or only the last.
        now: see `render`.

    Raises:
        UserError: as `render`; a chat up to a message is not the beginning of the whole chat.
    """
    text, spans = _render_marked(template, messages, False, now)
    tagged = _has_generation(template.source)
    if not tagged:
        spans = _prefix_spans(template, messages, text, turns, now)
    ids_T, places_T2 = tokenizer.encode_marked(text)
    mask_T = np.zeros(len(ids_T), bool)
    for begin, end in spans[-1:] if turns == "last" else spans:
        written_T = (places_T2[:, 0] < end) & (places_T2[:, 1] > begin)
        mask_T |= (
            written_T if tagged else _without_tail(written_T, text[:end], places_T2, tokenizer.token_bytes_V[ids_T])
        )
    return ids_T, mask_T


def _prefix_spans(
    template: ChatTemplate, messages: Messages, whole: str, turns: str, now: datetime | None
) -> list[tuple[int, int]]:  # fmt: skip
    """[begin, end) of the characters that each of the assistant's messages adds to the prompt for it."""
    answers = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
    spans = []
    for i in answers[-1:] if turns == "last" else answers:
        prompt = render(template, messages[:i], add_generation_prompt=True, now=now)
        answered = whole if i == len(messages) - 1 else render(template, messages[: i + 1], now=now)
        if not (answered.startswith(prompt) and whole.startswith(answered)):
            raise UserError(
                "chat_template", f"{template.source[:40]}...",
                f"a chat up to message {i + 1} of {len(messages)} to be written as in the whole chat",
                "Put {% generation %} and {% endgeneration %} around what the assistant writes in the template, or "
                'learn from the last answer alone (turns = "last").',
            )  # fmt: skip
        spans.append((len(prompt), len(answered)))
    return spans


def _without_tail(written_T: np.ndarray, text: str, places_T2: np.ndarray, bytes_T: np.ndarray) -> np.ndarray:
    """Without the blanks that follow the last special token, if nothing else follows it; `text` ends with the turn."""
    special = np.flatnonzero(written_T & (bytes_T == 0))
    if not len(special) or text[places_T2[special[-1], 1] :].strip():
        return written_T
    return written_T & (np.arange(len(written_T)) <= special[-1])


def _render_marked(
    template: ChatTemplate, messages: Messages, add_generation_prompt: bool, now: datetime | None
) -> tuple[str, list[tuple[int, int]]]:  # fmt: skip
    """The text, and [begin, end) of the characters that `{% generation %}` encloses."""
    chat = [dict(message) for message in messages]
    values = {"tools": None, "documents": None, **template.specials, "strftime_now": (now or datetime.now()).strftime}
    try:
        text = _compiled(template.source).render(messages=chat, add_generation_prompt=add_generation_prompt, **values)
    except Exception as error:  # A template is a program of its author: it may raise anything.
        line = getattr(error, "lineno", None)
        place = f" at line {line}" if line else ""
        raise UserError(
            "chat_template", f"{template.source[:40]}...", f"a template that takes this chat: {error}{place}",
            f"Roles of the chat: {', '.join(str(message.get('role')) for message in chat) or 'none'}.",
        ) from error  # fmt: skip
    if not _has_generation(template.source):
        return text, []
    check(
        not any(mark in json.dumps(chat, ensure_ascii=False, default=str) for mark in (_OPEN, _CLOSE)),
        "messages", "U+FDD0 or U+FDD1", "text without these noncharacters", "Unicode keeps them out of all text.",
    )  # fmt: skip
    return _unmark(text)


def _unmark(text: str) -> tuple[str, list[tuple[int, int]]]:
    pieces, spans, length = [], [], 0
    for part in text.split(_OPEN):
        inside, closed, after = part.rpartition(_CLOSE)
        # Only what follows the first mark has a closing one.
        if closed:
            spans.append((length, length + len(inside)))
        pieces.append(inside + after)
        length += len(pieces[-1])
    return "".join(pieces), [span for span in spans if span[0] < span[1]]


@lru_cache(maxsize=32)
def _has_generation(source: str) -> bool:
    tags = _environment().parse(source).find_all(nodes.ExtensionAttribute)
    return any(tag.identifier == _Generation.identifier for tag in tags)


@lru_cache(maxsize=32)
def _compiled(source: str) -> jinja2.Template:
    return _environment().from_string(source)


@lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    """As transformers 5.23 sets it (`chat_template_utils.py`); templates are downloaded, so they run in a sandbox."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise, "namespace": _Namespace}
    return environment


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:  # fmt: skip
    # Jinja's own filter writes for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Generation(Extension):
    """`{% generation %}`: what the assistant writes, between two marks."""

    tags: set[str] = {"generation"}  # noqa: RUF012 (as Jinja declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        """Called by Jinja at the tag."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        return f"{_OPEN}{caller()}{_CLOSE}"


class _Namespace(Namespace):
    """Without names that reach into Python, which the sandbox looks for in other places only."""

    def __init__(self, *args: Any, **values: Any) -> None:
        super().__init__()
        for name, value in dict(*args, **values).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace may not hold {name!r}")
        super().__setitem__(name, value)
