"""Rejection sampling: the posterior and Z by enumeration, where it stops, and what it is told."""

from collections import Counter
from math import comb

import jax
import numpy as np
import pytest
from enumerated import bigram_lm, chances, random_params

from lmlab.core.errors import UserError
from lmlab.inference.rejection import Accepted, rejection

VOCAB, END, FIRST, LONGEST = 4, 3, 1, 3
LM, PARAMS = bigram_lm(VOCAB), random_params(VOCAB, seed=2)
PROMPT = np.asarray([FIRST], np.int32)


def text_of(one):
    """With its end."""
    return (*one.tokens.tolist(), END) if one.ended else tuple(one.tokens.tolist())


def accept(one):
    """Texts with a 0 in them, of which no 1 comes right after one."""
    return 0 in one.tokens and (0, 1) not in list(zip(one.tokens[:-1].tolist(), one.tokens[1:].tolist(), strict=True))


def draw(key=0, **changes):
    options = {"accept": accept, "wanted": 20, "budget": 10_000, "tokens": LONGEST, "end_ids": [END]} | changes
    return rejection(LM, PARAMS, PROMPT, key=jax.random.key(key), **options)


def test_accepted_texts_are_those_of_the_posterior():
    made = draw(wanted=4000, budget=10**6, rows=1000)
    texts = chances(PARAMS, FIRST, [END], LONGEST)
    plain = lambda text: tuple(token for token in text if token != END)
    pairs = lambda text: set(zip(plain(text)[:-1], plain(text)[1:], strict=True))
    fine = {text: p for text, p in texts.items() if 0 in text and (0, 1) not in pairs(text)}
    z = sum(fine.values())
    assert made.enough
    assert len(made.samples) == 4000
    assert abs(made.evidence - z) < 4.5 * np.sqrt(z * (1 - z) / made.draws)
    counts = Counter(map(text_of, made.samples))
    assert set(counts) <= set(fine)
    for text, p in fine.items():
        assert abs(counts[text] / 4000 - p / z) < 4.5 * np.sqrt(p / z / 4000) + 1e-3, text


@pytest.mark.parametrize(("wanted", "budget"), [(2, 9), (3, 5), (4, 4), (5, 30)])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_estimate_is_unbiased_wherever_it_stops(wanted, budget, p):
    """Over all ways to be accepted or not."""
    mean = whole = 0.0
    for draws in range(wanted, budget + 1):
        chance = comb(draws - 1, wanted - 1) * p**wanted * (1 - p) ** (draws - wanted)
        mean += chance * Accepted([None] * wanted, draws, enough=True).evidence
        whole += chance
    for some in range(wanted):
        chance = comb(budget, some) * p**some * (1 - p) ** (budget - some)
        mean += chance * Accepted([None] * some, budget, enough=False).evidence
        whole += chance
    np.testing.assert_allclose([mean, whole], [p, 1], rtol=1e-12)


def test_it_stops_at_the_last_that_is_wanted_and_at_the_budget():
    judged = []
    made = draw(wanted=3, rows=16, accept=lambda one: judged.append(one) or accept(one))
    assert made.draws == len(judged)
    assert accept(judged[-1])
    assert [text_of(one) for one in made.samples] == [text_of(one) for one in judged if accept(one)]
    none = draw(budget=50, rows=16, accept=lambda one: False)
    assert (none.samples, none.draws, none.enough, none.evidence) == ([], 50, False, 0.0)
    every = draw(wanted=5, accept=lambda one: True)
    assert (every.draws, every.evidence) == (5, 1.0)


@pytest.mark.parametrize("changes", [{"wanted": 1}, {"budget": 19}, {"rows": 0}, {"temperature": 0.0}])
def test_rude_numbers_are_told(changes):
    with pytest.raises(UserError) as caught:
        draw(**changes)
    assert caught.value.field == next(iter(changes))
