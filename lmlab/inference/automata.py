"""Deterministic automata over bytes, and programs whose texts they accept.

A constraint on text is said over bytes, since tokens need not be whole characters and a text has many spellings in
tokens. An automaton is run over the bytes of every token from every state, once; a step is then one row of a table.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np

from lmlab.core.errors import check
from lmlab.core.types import Array
from lmlab.inference.programs import Particle, Program

MOST_MOVES = 2**28
"""States times tokens of a table at most: 512 MiB, where there are fewer than 2^15 states."""
LOOKED_BACK = 256
"""Bytes at the end of a prompt that an automaton may have begun with."""


@dataclass(frozen=True, eq=False)
class Automaton:
    """Q states, and state -1 of texts that nothing can be added to: as an index it is the last place of an array."""

    next_QB: np.ndarray
    """int32 [Q, 256], the state after each byte; -1: it may not follow."""
    accepts_Q: np.ndarray
    """bool, whether a text may end there."""
    start: int = 0

    def run(self, text: bytes) -> int:
        """The state after a text."""
        state = self.start
        for byte in text:
            state = int(self.next_QB[state, byte]) if state >= 0 else -1
        return state

    def accepts(self, text: bytes) -> bool:
        """Whether this is one of its texts."""
        state = self.run(text)
        return state >= 0 and bool(self.accepts_Q[state])

    def after(self, text: bytes) -> "Automaton":
        """The automaton of what follows a text, such as a prompt, that need not obey it: it has read the longest end of
        the text that may begin one of its own. So a word that a prompt has begun counts.
        """
        tail = text[-LOOKED_BACK:]
        state = next(state for i in range(len(tail) + 1) if (state := self.run(tail[i:])) >= 0)
        return replace(self, start=state)


def both(one: Automaton, other: Automaton) -> Automaton:
    """The texts that both accept."""
    places = {(one.start, other.start): 0}
    rows, accepts = [], []
    for left, right in (queue := list(places)):
        row_B = np.full(256, -1, np.int32)
        for byte in np.flatnonzero((one.next_QB[left] >= 0) & (other.next_QB[right] >= 0)):
            pair = int(one.next_QB[left, byte]), int(other.next_QB[right, byte])
            if pair not in places:
                places[pair] = len(places)
                queue.append(pair)
            row_B[byte] = places[pair]
        rows.append(row_B)
        accepts.append(one.accepts_Q[left] & other.accepts_Q[right])
    return minimal(Automaton(np.stack(rows), np.asarray(accepts)))


def minimal(automaton: Automaton) -> Automaton:
    """The same texts with the fewest states, by Moore's refinement; those that lead to no accepted text are gone."""
    # State Q stands for -1: it goes to itself.
    states = len(automaton.next_QB)
    next_SB = np.pad(
        np.where(automaton.next_QB < 0, states, automaton.next_QB), ((0, 1), (0, 0)), constant_values=states
    )
    class_S = np.append(automaton.accepts_Q, False).astype(np.int64)
    count = 0
    while count < (count := len(np.unique(class_S))):
        rows = np.concatenate([class_S[:, None], class_S[next_SB]], axis=1)
        _, first_N, class_S = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    dead = class_S[states]
    # Numbers without the dead class, which becomes -1.
    number_N = np.where(np.arange(count) == dead, -1, np.arange(count) - (np.arange(count) > dead))
    kept_N = first_N[np.arange(count) != dead]
    check(len(kept_N) > 0, "constraint", "one that nothing fulfils", "at least one text that does")
    next_QB = number_N[class_S[next_SB[kept_N]]].astype(np.int32)
    return Automaton(next_QB, np.append(automaton.accepts_Q, False)[kept_N], int(number_N[class_S[automaton.start]]))


def constrained(
    automaton: Automaton, spellings: Sequence[bytes], end_ids: Sequence[int] = (), tokens: int | None = None
) -> Program:  # fmt: skip
    """Text that an automaton accepts, by the locally optimal proposal: a token is drawn among those after which the
    text can still be accepted, and weighs their mass (arXiv 2306.03081, section 4).

    spellings: bytes of each of V tokens; those of none, special ones, are never drawn. end_ids: the tokens that end the
    text, where it is accepted; none: the text goes on until its room is filled, and what is there is not looked at.
    tokens: how many a text may have. The target is then the texts that end accepted within so many (without end_ids:
    are accepted at so many), and no particle is lost for want of room; give `infer` the same number. Raises `UserError`
    where there is no such text or the table would be too large.
    """
    next_QV = _next_tokens(automaton, spellings, end_ids)
    alive_TQ = _alive(next_QV, np.asarray(automaton.accepts_Q), bool(end_ids), tokens)
    check(bool(alive_TQ[-1, automaton.start]), "constraint", "one that no text of these tokens fulfils",
          f"at least one text, of at most {tokens} tokens" if tokens else "at least one text",
          "Check it against the vocabulary, and how many tokens may be written.")  # fmt: skip
    ends_V = np.isin(np.arange(len(spellings)), np.asarray(end_ids, np.int64))
    tables = {"next_QV": next_QV, "alive_TQ": alive_TQ, "ends_V": ends_V}

    def step(p: Particle, state: Array) -> Array:
        next_V = p.tables["next_QV"][state].astype(jnp.int32)
        left = 0 if tokens is None else jnp.clip(tokens - 1 - p.length, 0)
        p.observe(p.context.mask(p.tables["alive_TQ"][left][next_V]), True)
        token = p.sample(p.context.next_token())
        p.finish(p.tables["ends_V"][token])
        return next_V[token]

    return Program(step, jnp.int32(automaton.start), {name: jnp.asarray(table) for name, table in tables.items()})


def _next_tokens(automaton: Automaton, spellings: Sequence[bytes], end_ids: Sequence[int]) -> np.ndarray:
    """[Q, V]: the state after each token; Q of one that ends an accepted text, -1 of one that may not follow."""
    states, vocab = len(automaton.next_QB), len(spellings)
    check(states * vocab <= MOST_MOVES, "constraint", f"{states} states with {vocab} tokens",
          f"at most {MOST_MOVES // vocab} states", "Say it with fewer: [0-9] has one where \\d has many.")  # fmt: skip
    wrong = [i for i in end_ids if not 0 <= i < vocab]
    check(not wrong, "end_ids", wrong, f"tokens below {vocab}")
    kind = np.int16 if states < 2**15 - 1 else np.int32
    # Some states at a time: between them a table has four bytes a place.
    blocks = (np.arange(states, dtype=np.int32)[i : i + 256] for i in range(0, states, 256))
    next_QV = np.concatenate([_after_tokens(automaton.next_QB, block_R, spellings).astype(kind) for block_R in blocks])
    next_QV[:, list(end_ids)] = np.where(automaton.accepts_Q, states, -1)[:, None]
    return next_QV


def _after_tokens(next_QB: np.ndarray, state_R: np.ndarray, spellings: Sequence[bytes]) -> np.ndarray:
    """[R, V]: the state after each token in each of some states; -1 after tokens without bytes."""
    table_QB = np.append(next_QB, np.full((1, 256), -1, np.int32), axis=0)
    # Longest first: those that have a byte at some place are the first ones.
    order_V = sorted(range(len(spellings)), key=lambda i: -len(spellings[i]))
    next_RV = np.repeat(state_R[:, None], len(spellings), axis=1)
    left = len(spellings)
    for i in range(len(spellings[order_V[0]])):
        while len(spellings[order_V[left - 1]]) <= i:
            left -= 1
        byte_V = np.asarray([spellings[token][i] for token in order_V[:left]])
        next_RV[:, :left] = table_QB[next_RV[:, :left], byte_V]
    next_RV[:, [not spellings[token] for token in order_V]] = -1
    return next_RV[:, np.argsort(order_V)]


def _alive(next_QV: np.ndarray, accepts_Q: np.ndarray, ends: bool, tokens: int | None) -> np.ndarray:
    """[T, Q + 2]: whether a text can still be accepted with so many tokens left, or ([1, Q + 2]) with any number.

    The last states are those of texts that have ended, and of those with no way to go on.
    """
    states = len(accepts_Q)
    # Each move between two states once; a text that has ended stays where it is.
    after = [moves[moves >= 0] for moves in map(np.unique, next_QV)] + [np.asarray([states])]
    from_M, to_M = np.repeat(np.arange(states + 1), list(map(len, after))), np.concatenate(after)
    alive = [np.append(accepts_Q & (not ends), [True, False])]
    while tokens is None or len(alive) <= tokens:
        more_S = np.zeros(states + 2, bool)
        more_S[from_M[alive[-1][to_M]]] = True
        if tokens is None:
            more_S |= alive[-1]
            if np.array_equal(more_S, alive[-1]):
                return alive[-1][None]
        alive.append(more_S)
    return np.stack(alive)
