"""Synthetic documents of which the predictable part is known: names that return, and arithmetic of polynomials."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmlab.core.types import Array, Key, TokenBatch

FILLERS, NAME_TOKENS = 16, 32
"""Tokens of the text around the names, and those that names are made of."""
NAMES, NAME_RATE = 2, 0.2
"""Names of a document, and the probability that one starts after a whole word."""


def induction_chain(key: Key) -> Array:
    """Transition log-probabilities [16, 16] of the text around the names: sparse, Dirichlet 0.1."""
    return jnp.log(jax.random.dirichlet(key, jnp.full(FILLERS, 0.1), (FILLERS,)) + 1e-30)


def induction_rows(key: Key, chain: Array, rows: int, length: int) -> tuple[TokenBatch, Array]:
    """Documents in which two fresh names of two tokens each return in random text, after arXiv 2404.19737, section 4.1.

    A name's second token cannot be guessed when the name comes first, and is found from then on by a head that
    looks back (induction); where both names begin alike, as one of two. Vocabulary: 16 filler tokens, then 32 name
    tokens. Returns rows of one document each, and bool [B, T]: true at second tokens of names that came before.
    """

    def document(key: Key) -> tuple[Array, Array]:
        names_key, start_key, text_key = jax.random.split(key, 3)
        names = FILLERS + jax.random.randint(names_key, (NAMES, 2), 0, NAME_TOKENS)

        def step(carry: tuple[Array, Array, Array], key: Key) -> tuple[tuple[Array, Array, Array], tuple[Array, Array]]:
            filler, pending, seen = carry  # pending: the name whose first token was the last; -1: none
            rate_key, name_key, filler_key = jax.random.split(key, 3)
            second = pending >= 0
            starts = ~second & (jax.random.uniform(rate_key) < NAME_RATE)
            name = jax.random.randint(name_key, (), 0, NAMES)
            following = jax.random.categorical(filler_key, chain[filler])
            token = jnp.where(second, names[pending, 1], jnp.where(starts, names[name, 0], following))
            known = second & seen[pending]
            seen = seen | (second & (jnp.arange(NAMES) == pending))
            filler = jnp.where(second | starts, filler, following)
            return (filler, jnp.where(starts, name, -1), seen), (token, known)

        start = jax.random.randint(start_key, (), 0, FILLERS), jnp.asarray(-1), jnp.zeros(NAMES, bool)
        return jax.lax.scan(step, start, jax.random.split(text_key, length))[1]

    tokens_BT, known_BT = jax.vmap(document)(jax.random.split(key, rows))
    return one_document_a_row(tokens_BT), known_BT


def one_document_a_row(tokens_BT: Array) -> TokenBatch:
    """Rows without padding, of which every token is a label."""
    places_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None], tokens_BT.shape)
    ones_BT = jnp.ones(tokens_BT.shape, jnp.int32)
    return TokenBatch(tokens_BT.astype(jnp.int32), ones_BT, places_BT, ones_BT.astype(bool))


PRIME, DEGREE = 7, 5
"""The ring is F_7[X] / (X^5): polynomials of 5 coefficients."""
MINUS, PLUS, TIMES, COMPOSE, OPEN, CLOSE, EQUALS, PAD = range(PRIME, PRIME + 8)
POLYNOMIAL_VOCAB = PRIME + 8
Polynomial = tuple[int, ...]
"""Coefficients of X^0 to X^4."""


def add(a: Polynomial, b: Polynomial) -> Polynomial:
    """A + b."""
    return tuple((x + y) % PRIME for x, y in zip(a, b, strict=True))


def multiply(a: Polynomial, b: Polynomial) -> Polynomial:
    """A b."""
    return tuple(sum(a[i] * b[k - i] for i in range(k + 1)) % PRIME for k in range(DEGREE))


def compose(a: Polynomial, b: Polynomial) -> Polynomial:
    """A(b), by Horner's rule in the ring on the representatives of degree 4 and less.

    On the ring itself it is not well defined where b has a constant term; this is the convention here.
    """
    out = (0,) * DEGREE
    for coefficient in reversed(a):
        out = add(multiply(out, b), (coefficient, *(0,) * (DEGREE - 1)))
    return out


class Expression(NamedTuple):
    """Tokens of an expression, fully parenthesised, one a coefficient; and its value."""

    tokens: list[int]
    value: Polynomial


def random_expression(rng: np.random.Generator, operations: int) -> Expression:
    """Operators and coefficients uniform; what is left of the operations is dealt to both sides at random."""
    if operations == 0:
        leaf = tuple(rng.integers(0, PRIME, DEGREE).tolist())
        return Expression(list(leaf), leaf)
    operator = int(rng.integers(MINUS, COMPOSE + 1))
    if operator == MINUS:
        inner = random_expression(rng, operations - 1)
        return Expression([OPEN, MINUS, *inner.tokens, CLOSE], tuple(-x % PRIME for x in inner.value))
    left = int(rng.integers(0, operations))
    a, b = random_expression(rng, left), random_expression(rng, operations - 1 - left)
    value = {PLUS: add, TIMES: multiply, COMPOSE: compose}[operator](a.value, b.value)
    return Expression([OPEN, *a.tokens, operator, *b.tokens, CLOSE], value)


def polynomial_rows(rng: np.random.Generator, operations: list[int], lookahead: int = 0) -> TokenBatch:
    """A row `expression = value` for each number of operations (arXiv 2404.19737, section 4.2); the value is its label.

    Rows are as long as the longest such can be, and `lookahead` of padding more.
    """
    drawn = [random_expression(rng, count) for count in operations]
    texts = [[*one.tokens, EQUALS, *one.value] for one in drawn]
    most = max(operations)
    length = DEGREE * (most + 1) + 3 * most + 1 + DEGREE + lookahead
    tokens_BT = np.full((len(texts), length), PAD, np.int32)
    ends_B1 = np.asarray([[len(text)] for text in texts])
    for tokens_T, text in zip(tokens_BT, texts, strict=True):
        tokens_T[: len(text)] = text
    places_BT = np.broadcast_to(np.arange(length, dtype=np.int32), tokens_BT.shape)
    inside_BT = places_BT < ends_B1
    return TokenBatch(
        jnp.asarray(tokens_BT), jnp.asarray(inside_BT, jnp.int32), jnp.asarray(np.where(inside_BT, places_BT, 0)),
        jnp.asarray(inside_BT & (places_BT >= ends_B1 - DEGREE)),
    )  # fmt: skip
