"""Infilling, intersection and a classifier against the posterior over all texts."""

import math
from itertools import product

import jax
import numpy as np
import pytest
from enumerated import assert_posterior, bigram_lm, chances, random_params, runs

from lmlab.core.errors import UserError
from lmlab.inference.composition import classified, infilling, intersection, token_scores
from lmlab.inference.smc import standard, steering

VOCAB, END, FIRST = 4, 3, 1
LM, PARAMS = bigram_lm(VOCAB), random_params(VOCAB, seed=1)


def log_chance(text, first=FIRST):
    p_VV = np.log(np.asarray(jax.nn.softmax(PARAMS["logits_VV"]), float))
    return sum(p_VV[a, b] for a, b in zip((first, *text[:-1]), text, strict=True))


def gap_weights(fragments, room, least, more):
    """By the definition: chances of gap lengths times those of the text, gaps without end tokens."""
    weights = {}
    gaps = len(fragments) - 1
    left = room - sum(map(len, fragments)) - 1
    for sizes in product(range(least, left + 1), repeat=gaps):
        if sum(sizes) > left:
            continue
        prior = math.prod((1 - more) * more ** (size - least) for size in sizes)
        for filling in product(range(END), repeat=sum(sizes)):
            rest, text = list(filling), list(fragments[0])
            for size, fragment in zip(sizes, fragments[1:], strict=True):
                text += rest[:size] + list(fragment)
                rest = rest[size:]
            text = (*text, END)
            weights[text] = weights.get(text, 0) + prior * math.exp(log_chance(text))
    return weights


@pytest.mark.parametrize(
    ("fragments", "driver"),
    [(([2], [0], [1, 1]), standard(threshold=1.0)), (([], [2, 0], []), steering(2)), (([0], [1]), steering(1))],
    ids=["two_gaps", "open_ends", "one_gap"],
)
def test_gaps_are_filled_as_the_model_would_given_the_fragments(fragments, driver):
    room = 7
    program = infilling(fragments, VOCAB, room, [END], least=1, more=0.4)
    made = runs(LM, PARAMS, program, [FIRST], room, driver=driver, count=1500)
    assert made[3][made[0] > -np.inf].all()
    assert_posterior(made, gap_weights(fragments, room, 1, 0.4))


def test_gaps_have_two_tokens_at_least_unless_said_otherwise():
    made = runs(LM, PARAMS, infilling(([0], [2]), VOCAB, 12, [END]), [FIRST], 12, count=50)
    assert made[2][made[3]].min() == 5


@pytest.mark.parametrize("driver", [standard(threshold=1.0), steering(3)], ids=["standard", "steering"])
def test_a_text_that_two_prompts_expect(driver):
    program = intersection(2, [END])
    one, other = (chances(PARAMS, first, [END], 3) for first in (0, 2))
    made = runs(LM, PARAMS, program, [0, 2], 3, driver=driver)
    assert_posterior(made, {text: p * other[text] for text, p in one.items()})


def test_texts_are_weighed_by_the_class_of_the_whole():
    scores_V = np.asarray([2.0, -1.0, 0.5, 0.3])
    sigmoid = lambda x: 1 / (1 + math.exp(-x))
    made = runs(LM, PARAMS, classified(scores_V, bias=-0.5, strength=2.0, end_ids=[END]), [FIRST], 3)
    texts = chances(PARAMS, FIRST, [END], 3)
    assert_posterior(made, {text: p * sigmoid(-0.5 + scores_V[list(text)].sum()) ** 2 for text, p in texts.items()})


def test_scores_of_tokens_are_log_ratios_of_smoothed_shares():
    found = token_scores([np.asarray([0, 0, 1])], [np.asarray([1]), np.asarray([2, 1])], 3)
    assert np.allclose(found, np.log([(3 / 6) / (1 / 6), (2 / 6) / (3 / 6), (1 / 6) / (2 / 6)]))


@pytest.mark.parametrize(
    ("build", "word"),
    [
        (lambda: infilling(([0],), VOCAB, 9, [END]), "at least two"),
        (lambda: infilling(([0], [], [1]), VOCAB, 9, [END]), "all but the first and the last"),
        (lambda: infilling(([0], []), VOCAB, 9), "end token"),
        (lambda: infilling(([0], [1]), VOCAB, 9, [END], least=0), "least"),
        (lambda: infilling(([0], [1]), VOCAB, 9, [END], more=1.0), "more"),
        (lambda: infilling(([0], [1]), VOCAB, 4, [END]), "at least 5"),
        (lambda: intersection(1), "contexts"),
        (lambda: classified(np.asarray([0.0, np.nan])), "scores"),
        (lambda: token_scores([], [np.asarray([0])], 3), "inside"),
        (lambda: token_scores([np.asarray([0])], [np.asarray([0])], 3, smoothing=0.0), "smoothing"),
    ],
)
def test_what_cannot_be_built_is_said(build, word):
    with pytest.raises(UserError, match=word):
        build()
