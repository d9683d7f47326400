"""Text of a context-free language or of a JSON schema: masks that a parser of the library llguidance computes.

A parser is no table: the masks of a round are asked of Python, once for each text that particles share. They are exact
for any vocabulary, whatever tokens spell a text.
"""

import json
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import llguidance
import numpy as np

from lmlab.core.errors import UserError, check
from lmlab.core.types import Array
from lmlab.inference.programs import Particle, Program

MOST_PARSERS = 1024
"""Texts whose parsers are kept; those of others are made again from what is left of them."""
ANY_TOKENS = '\n%llguidance {"no_forcing": true}\n'
"""Where only one text can follow the library would allow only the tokens that its tokenizer cuts it into, and the
others, which a model may well write, would be lost from the posterior."""


def grammar(text: str, spellings: Sequence[bytes], end_ids: Sequence[int], tokens: int) -> Program:
    """Text of a grammar in the syntax of Lark, as llguidance reads it, such as `start: "a" start?`.

    By the locally optimal proposal: tokens are drawn among those that may follow, and weigh their mass (arXiv
    2306.03081, section 4). spellings: bytes of each of V tokens; those of none, special ones, are never drawn. end_ids:
    the tokens that end a text, where it is complete. tokens: how many a text may have, its end included; one that
    needs more dies at the last of them. Give `infer` the same number. Raises `UserError` for a grammar that cannot be
    read, with the library's message.
    """
    return _parsed("grammar", text, text + ANY_TOKENS, spellings, end_ids, tokens)


def json_schema(
    schema: str | dict[str, Any], spellings: Sequence[bytes], end_ids: Sequence[int], tokens: int
) -> Program:
    """JSON that a schema describes; the rest as of `grammar`. Any white space may stand between its parts, unless the
    schema has `"x-guidance": {"whitespace_flexible": false}`. Raises `UserError` for a schema that cannot be read, or
    that says what the library cannot enforce.
    """
    try:
        read = json.loads(schema) if isinstance(schema, str) else schema
    except json.JSONDecodeError as error:
        raise UserError("schema", schema, f"JSON ({error})") from error
    check(isinstance(read, dict | bool), "schema", schema, "an object, or true")
    return _parsed("schema", schema, f"start: %json {json.dumps(read)}{ANY_TOKENS}", spellings, end_ids, tokens)


def _parsed(
    field: str, value: object, text: str, spellings: Sequence[bytes], end_ids: Sequence[int], tokens: int
) -> Program:  # fmt: skip
    check(tokens >= 1, "tokens", tokens, "at least 1")
    parsers = _Parsers(field, value, text, spellings, end_ids)
    shape = jax.ShapeDtypeStruct((-(-len(spellings) // 8),), jnp.uint8)
    end_V = jnp.isin(jnp.arange(len(spellings)), jnp.asarray(end_ids))

    def step(p: Particle, path_T: Array) -> Array:
        # All children of a particle share its text: it is asked about once.
        bits = jax.pure_callback(parsers.allowed, shape, path_T, p.length, vmap_method="broadcast_all")
        p.observe(p.context.mask(jnp.unpackbits(bits, count=len(spellings), bitorder="little") == 1), True)
        # A text that the last token does not complete is none, and is not to take the place of one.
        p.observe(p.context.mask(p.tables | (p.length < tokens - 1)), True)
        token = p.sample(p.context.next_token())
        p.finish(p.tables[token])
        return path_T.at[p.length].set(token, mode="drop")

    return Program(step, jnp.zeros(tokens, jnp.int32), end_V)


class _Parsers:
    """Parsers after texts, by the tokens of the texts: what is kept saves time and changes nothing."""

    def __init__(
        self, field: str, value: object, text: str, spellings: Sequence[bytes], end_ids: Sequence[int]
    ) -> None:  # fmt: skip
        vocab = len(spellings)
        check(len(end_ids) > 0 and all(0 <= i < vocab for i in end_ids), "end_ids", list(end_ids),
              f"at least one token, all below {vocab}")  # fmt: skip
        words = llguidance.TokenizerWrapper(_Words(spellings, end_ids))
        tokenizer = llguidance.LLTokenizer(words, n_vocab=vocab, eos_token=list(end_ids), slices=None)
        start = llguidance.LLMatcher(tokenizer, text, log_level=0)
        if start.is_error():
            # The library's message goes on with the lines that it has read, ours among them.
            reason = start.get_error().split("\n")[0]
            raise UserError(field, value, f"a {field} that llguidance reads ({reason})")
        end_V = np.isin(np.arange(vocab), end_ids)
        bits = lambda some_V: np.packbits(some_V, bitorder="little")
        self._spelled = bits(~end_V & np.asarray([bool(spelling) for spelling in spellings]))
        self._ends, self._start = bits(end_V), start
        self._kept: OrderedDict[tuple[int, ...], tuple[Any, np.ndarray]] = OrderedDict()

    def allowed(self, path_T: Any, length: Any) -> np.ndarray:
        """Bits [..., V / 8] of the tokens that may follow the first `length` tokens of each path [..., T]."""
        lengths_R = np.asarray(length).reshape(-1)
        paths_RT = np.asarray(path_T).reshape(len(lengths_R), -1)
        rows = [self._mask(tuple(path[:n].tolist())) for path, n in zip(paths_RT, lengths_R, strict=True)]
        return np.stack(rows).reshape(*np.shape(length), -1)

    def _mask(self, path: tuple[int, ...]) -> np.ndarray:
        if path not in self._kept:
            known = next((n for n in range(len(path), 0, -1) if path[:n] in self._kept), 0)
            parser = (self._kept[path[:known]][0] if known else self._start).deep_copy()
            fine = parser.consume_tokens(list(path[known:]))
            bits = np.frombuffer(parser.compute_bitmask(), np.uint8)[: len(self._spelled)] & self._spelled
            # Where nothing may follow the library says that the text ends, complete or not.
            bits |= self._ends * np.uint8(parser.is_accepting())
            self._kept[path] = parser, bits * np.uint8(fine)
            while len(self._kept) > MOST_PARSERS:
                self._kept.popitem(last=False)
        self._kept.move_to_end(path)
        return self._kept[path][1]


class _Words:
    """A vocabulary as llguidance asks for it."""

    def __init__(self, spellings: Sequence[bytes], end_ids: Sequence[int]) -> None:
        self.eos_token_id, self.bos_token_id = end_ids[0], None
        self.tokens = list(spellings)
        self.special_token_ids = [i for i, spelling in enumerate(spellings) if not spelling]

    def __call__(self, text: bytes) -> list[int]:
        """Cuts nothing: only texts that are forced are cut, see ANY_TOKENS."""
        return []
