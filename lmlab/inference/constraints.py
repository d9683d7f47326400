"""What text may say, as automata over bytes: patterns, choices, words of a list or a length, and what is forbidden."""

from collections.abc import Sequence

import numpy as np
import outlines_core

from lmlab.core.errors import UserError, check
from lmlab.inference.automata import Automaton, minimal

SEPARATORS = b" \t\n\r.,;:!?()\"'-"
"""Bytes that stand between words."""
OTHER_SIGNS = frozenset({0xC2, 0xE2, *range(0xF0, 0x100)})
"""First bytes of characters that are no letters, nearly all: signs of Latin-1, U+2000 to U+2FFF, and emoji."""

LAST = "\U0010ffff"
"""A character that Unicode keeps free."""


def regex(pattern: str) -> Automaton:
    r"""Texts that a pattern matches as a whole, in the syntax of the Rust library regex: no looking around.

    `.`, `\w` and `\d` are of all Unicode. Raises `UserError` for a pattern that cannot be read or matches nothing.
    """
    _index(pattern, pattern)
    # An Index (of outlines-core 0.2.14) lacks the bytes that follow an accepted text without making another: (ab)+ has
    # no "aba". So nothing is accepted in it but texts with a last character that no text has; before that one a text is
    # accepted. The line break ends a comment that the pattern may end with; what is before it matches nothing.
    index = _index(pattern, f"(?:{pattern}|[^\\s\\S]\n){LAST}")
    moves, first, finals = index.get_transitions(), index.get_initial_state(), index.get_final_states()
    places = {state: i for i, state in enumerate([first, *({*moves, *finals} - {first})])}
    next_QB = np.full((len(places), 256), -1, np.int32)
    for state, row in moves.items():
        for byte, after in row.items():
            if byte < 256:
                next_QB[places[state], byte] = places[after]
    after_Q = np.arange(len(places))
    for byte in LAST.encode():
        after_Q = np.where(after_Q < 0, -1, next_QB[after_Q, byte])
    return minimal(Automaton(next_QB, np.isin(after_Q, [places[state] for state in finals])))


def _index(pattern: str, wrapped: str) -> outlines_core.Index:
    single_bytes = {bytes([byte]): [byte] for byte in range(256)}
    try:
        return outlines_core.Index(wrapped, outlines_core.Vocabulary(256, single_bytes))
    except ValueError as error:
        raise UserError("pattern", pattern, f"a regular expression ({error})") from error


def one_of(texts: Sequence[str]) -> Automaton:
    """One of these texts. Raises `UserError` for none."""
    next_QB, ends_N = _trie("texts", texts)
    accepts_Q = np.zeros(len(next_QB), bool)
    accepts_Q[ends_N] = True
    return minimal(Automaton(next_QB, accepts_Q))


def only_words(words: Sequence[str], separators: bytes = SEPARATORS) -> Automaton:
    """Words of a list, as they are spelled there, with any number of separators between, before and after them.

    Raises `UserError` for no words, and for words with a separator in them.
    """
    next_QB, ends_N = _trie("words", words)
    wrong = [word for word in words if set(word.encode()) & set(separators)]
    check(not wrong, "words", wrong[:3], "words without spaces and other separators")
    between_N = [0, *ends_N]
    next_QB[np.ix_(between_N, list(separators))] = 0
    return minimal(Automaton(next_QB, np.isin(np.arange(len(next_QB)), between_N)))


def word_length(letters: int) -> Automaton:
    """No word, a run of letters, is longer than this (arXiv 2306.03081, section 4).

    Characters are counted, not bytes: those of ASCII are letters or not; the others are by their first byte, so that
    accented and all other letters count as one each, and dashes, quotes and emoji as none. Raises `UserError` below 1.
    """
    check(letters >= 1, "letters", letters, "at least 1")
    first = [bytes([b]).isalpha() or (b >= 0xC0 and b not in OTHER_SIGNS) for b in range(256)]
    after_B = np.where(first, 1, 0)
    more_B = (np.arange(256) & 0xC0) == 0x80
    counts_Q1 = np.arange(letters + 1)[:, None]
    next_QB = np.where(more_B, counts_Q1, np.where(after_B, counts_Q1 + 1, 0))
    return Automaton(np.where(next_QB > letters, -1, next_QB).astype(np.int32), np.ones(letters + 1, bool))


def without(texts: Sequence[str]) -> Automaton:
    """Texts in which none of these stands anywhere, by the automaton of Aho and Corasick (1975).

    Raises `UserError` for none, and for an empty one, which stands everywhere.
    """
    check(all(texts), "texts", "", "texts that are not empty")
    next_QB, ends_N = _trie("texts", texts)
    bad_Q = np.zeros(len(next_QB), bool)
    bad_Q[ends_N] = True
    # What a text would be, had it begun a byte later; nodes are numbered so that shorter ones are done first.
    shorter_Q = np.zeros(len(next_QB), np.int64)
    queue = [0]
    for node in queue:
        fallback_B = next_QB[shorter_Q[node]] if node else np.zeros(256, np.int32)
        for byte in np.flatnonzero(next_QB[node] >= 0):
            child = next_QB[node, byte]
            shorter_Q[child] = fallback_B[byte]
            bad_Q[child] |= bad_Q[fallback_B[byte]]
            queue.append(child)
        next_QB[node] = np.where(next_QB[node] >= 0, next_QB[node], fallback_B)
    return minimal(Automaton(np.where(bad_Q[next_QB], -1, next_QB), ~bad_Q))


def _trie(field: str, texts: Sequence[str]) -> tuple[np.ndarray, list[int]]:
    """Of texts by their bytes: the node [Q, 256] after each byte from node 0, -1 for none, and where each text ends."""
    check(len(texts) > 0, field, list(texts), "at least one")
    nodes: list[dict[int, int]] = [{}]
    ends = []
    for text in texts:
        at = 0
        for byte in text.encode():
            if byte not in nodes[at]:
                nodes[at][byte] = len(nodes)
                nodes.append({})
            at = nodes[at][byte]
        ends.append(at)
    next_QB = np.full((len(nodes), 256), -1, np.int32)
    for node, children in enumerate(nodes):
        next_QB[node, list(children)] = list(children.values())
    return next_QB, ends
