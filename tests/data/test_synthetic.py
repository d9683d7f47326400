"""What is marked as predictable is, and nothing else; the arithmetic is that of the ring."""

import jax
import numpy as np
import pytest

from lmlab.data.synthetic import (
    DEGREE,
    EQUALS,
    FILLERS,
    NAME_TOKENS,
    PAD,
    PRIME,
    add,
    compose,
    induction_chain,
    induction_rows,
    multiply,
    polynomial_rows,
    random_expression,
)

ROWS, LENGTH = 64, 80


def test_second_tokens_of_names_are_known_once_they_have_come():
    chain = induction_chain(jax.random.key(0))
    batch, known = induction_rows(jax.random.key(1), chain, ROWS, LENGTH)
    again, _ = induction_rows(jax.random.key(1), chain, ROWS, LENGTH)
    assert np.array_equal(batch.tokens_BT, again.tokens_BT)
    names, starts, steps = 0, 0, 0
    for tokens, marks in zip(np.asarray(batch.tokens_BT), np.asarray(known), strict=True):
        assert np.all(tokens < FILLERS + NAME_TOKENS)
        place, seen = 0, set()
        while place < LENGTH:
            steps += 1
            if tokens[place] < FILLERS:
                assert not marks[place]
                place += 1
                continue
            starts += 1
            if place + 1 < LENGTH:
                pair = tuple(tokens[place : place + 2].tolist())
                assert not marks[place]
                assert marks[place + 1] == (pair in seen)
                seen.add(pair)
            place += 2
        names += len(seen)
        assert len(seen) <= 2
    assert names > 1.8 * ROWS
    assert starts / steps == pytest.approx(0.2, abs=0.02)


def test_text_between_names_follows_the_chain():
    chain = induction_chain(jax.random.key(0))
    tokens = np.asarray(induction_rows(jax.random.key(2), chain, 512, LENGTH)[0].tokens_BT)
    texts = [row[row < FILLERS] for row in tokens]
    counts = np.zeros((FILLERS, FILLERS))
    for text in texts:
        np.add.at(counts, (text[:-1], text[1:]), 1)
    often = counts.sum(1) > 500
    assert often.sum() >= 4
    found = counts[often] / counts[often].sum(1, keepdims=True)
    np.testing.assert_allclose(found, np.exp(np.asarray(chain))[often], atol=0.06)


def value(polynomial, x, terms=DEGREE):
    return sum(c * x**k for k, c in enumerate(polynomial[:terms])) % PRIME


def test_products_and_compositions_are_those_of_numpy_cut_off():
    rng = np.random.default_rng(0)
    for _ in range(50):
        a, b = (tuple(rng.integers(0, PRIME, DEGREE).tolist()) for _ in range(2))
        assert multiply(a, b) == tuple((np.convolve(a, b)[:DEGREE] % PRIME).tolist())
        assert all(value(add(a, b), x) == (value(a, x) + value(b, x)) % PRIME for x in range(PRIME))
        inner = (0, *b[1:])  # without a constant term the composition is that of the polynomials themselves
        whole = np.polynomial.Polynomial(a)(np.polynomial.Polynomial(inner)).coef
        exact = np.pad(np.round(whole), (0, DEGREE))[:DEGREE] % PRIME
        assert compose(a, inner) == tuple(exact.astype(int).tolist())
    assert compose((0, 1, 0, 0, 0), (3, 1, 4, 1, 5)) == (3, 1, 4, 1, 5)
    assert compose((0, 0, 1, 0, 0), (1, 1, 0, 0, 0)) == (1, 2, 1, 0, 0)


def read(tokens):
    """The value of an expression, by a parser of its own."""
    stack = []
    for token in tokens:
        if token == 12:  # the closing parenthesis
            b = stack.pop()
            operator = stack.pop()
            if operator == 7:
                stack.append(tuple(-x % PRIME for x in b))
            else:
                stack.append({8: add, 9: multiply, 10: compose}[operator](stack.pop(), b))
        elif token < PRIME:
            if not (stack and isinstance(stack[-1], list)):
                stack.append([])
            stack[-1].append(token)
            if len(stack[-1]) == DEGREE:
                stack.append(tuple(stack.pop()))
        elif token != 11:
            stack.append(token)
    (found,) = stack
    return found


@pytest.mark.parametrize("operations", range(6))
def test_an_expression_reads_as_its_value(operations):
    rng = np.random.default_rng(operations)
    for _ in range(30):
        one = random_expression(rng, operations)
        assert read(one.tokens) == one.value
        assert sum(7 <= token <= 10 for token in one.tokens) == operations


def test_rows_hold_expression_and_value_and_learn_the_value():
    batch = polynomial_rows(np.random.default_rng(0), [1, 2] * 20, lookahead=3)
    for tokens, segments, labels in zip(batch.tokens_BT, batch.segments_BT, batch.label_mask_BT, strict=True):
        tokens, inside = np.asarray(tokens), np.asarray(segments) == 1
        assert np.all((tokens == PAD) == ~inside)
        assert not inside[-3:].any()
        text = tokens[inside].tolist()
        assert text[-DEGREE - 1] == EQUALS
        assert tokens[np.asarray(labels)].tolist() == text[-DEGREE:]
        assert read(text[: -DEGREE - 1]) == tuple(text[-DEGREE:])
    lengths = {int(np.sum(row)) for row in batch.segments_BT}
    assert max(lengths) == batch.tokens_BT.shape[1] - 3
