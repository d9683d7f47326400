"""pass@k and maj@k are the means over all subsets of k samples, found here by going through them."""

import itertools
from collections import Counter

import jax
import numpy as np
import pytest

from lmlab.core.errors import UserError
from lmlab.evals.intervals import bootstrap_interval, standard_error
from lmlab.evals.repeated import majority_at_k, pass_at_k

CASES = ["a", "ab", "aab", "aabb", "aabbc", "abcde", "aaabbbc", "aab--", "----", "abbccc-", "aabbccdd"]


@pytest.mark.parametrize("samples", range(1, 7))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(samples):
    every = np.asarray(list(itertools.product([False, True], repeat=samples)))
    for k in range(1, samples + 1):
        wanted = [np.mean([any(subset) for subset in itertools.combinations(row, k)]) for row in every]
        np.testing.assert_allclose(pass_at_k(every, k), wanted, atol=1e-12)


def test_pass_at_k_is_exact_for_many_samples():
    right_PN = np.zeros((3, 2000), bool)
    right_PN[1, :1] = right_PN[2, :1500] = True
    assert pass_at_k(right_PN, 1000).tolist() == [0, 0.5, 1]


def by_subsets(answers, right, k):
    """The vote in every subset, ties shared."""
    total, count = 0.0, 0
    for subset in itertools.combinations(zip(answers, right, strict=True), k):
        votes = Counter(answer for answer, _ in subset if answer is not None)
        best = [answer for answer, size in votes.items() if size == max(votes.values())]
        verdicts = dict(subset)
        total += sum(verdicts[answer] for answer in best) / len(best) if best else 0
        count += 1
    return total / count


@pytest.mark.parametrize("right", ["a", "b", "ac", ""])
@pytest.mark.parametrize("letters", CASES)
def test_majority_at_k_is_the_vote_of_every_subset(letters, right):
    answers = [None if letter == "-" else letter for letter in letters]
    verdicts = [letter in right for letter in letters]
    for k in range(1, len(letters) + 1):
        assert majority_at_k(answers, verdicts, k) == pytest.approx(by_subsets(answers, verdicts, k), abs=1e-12)


def test_majority_at_k_takes_many_samples():
    answers = ["right"] * 40 + ["wrong"] * 30 + list(range(58))
    verdicts = [answer == "right" for answer in answers]
    assert majority_at_k(answers, verdicts, 1) == pytest.approx(40 / 128)
    assert majority_at_k(answers, verdicts, 128) == 1
    rng = np.random.default_rng(0)
    wins = 0.0
    for _ in range(4000):
        votes = Counter(answers[i] for i in rng.permutation(128)[:32])
        best = [answer for answer, size in votes.items() if size == max(votes.values())]
        wins += ("right" in best) / len(best)
    # Five standard errors of 4,000 draws.
    assert majority_at_k(answers, verdicts, 32) == pytest.approx(wins / 4000, abs=0.04)


def test_what_cannot_be_counted_is_refused():
    for k in (0, 4):
        with pytest.raises(UserError, match="k = "):
            pass_at_k(np.ones((2, 3), bool), k)
        with pytest.raises(UserError, match="k = "):
            majority_at_k("abc", [True] * 3, k)
    with pytest.raises(UserError, match="right"):
        majority_at_k("aa", [True, False], 1)


def test_an_interval_holds_the_mean_as_often_as_it_says():
    rng, key = np.random.default_rng(0), jax.random.key(0)
    held = 0
    for trial in range(300):
        values = rng.random(60) < 0.3
        low, high = bootstrap_interval(values, jax.random.fold_in(key, trial), level=0.9, resamples=400)
        held += low <= 0.3 <= high
    # 270 expected; 19 is more than three standard deviations of a binomial.
    assert abs(held - 270) < 25
    values = rng.random(200)
    low, high = bootstrap_interval(values, key)
    assert (high - low) / 2 == pytest.approx(1.96 * standard_error(values), rel=0.1)
    assert bootstrap_interval(values, key) == (low, high)
    assert bootstrap_interval(np.ones(5), key) == (1, 1)
    with pytest.raises(UserError, match="values"):
        bootstrap_interval(np.zeros(0), key)


def test_the_standard_error_is_that_of_the_sample():
    assert standard_error(np.asarray([0.0, 1.0, 1.0])) == pytest.approx(1 / 3)
    assert np.isnan(standard_error(np.ones(1)))
