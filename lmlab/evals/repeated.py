"""What many samples of one problem are worth: pass@k and maj@k, exactly, for every k up to their number."""

import math
from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np

from lmlab.core.errors import check


def pass_at_k(right_PN: np.ndarray, k: int) -> np.ndarray:
    """Probability of each problem that k of its N samples hold a right one, float64 [P]; right_PN is bool.

    The mean over all subsets of k samples, which is unbiased: 1 - C(N - c, k) / C(N, k) with c right ones
    (arXiv 2107.03374, equation 1).
    """
    right_PN = np.asarray(right_PN, bool)
    samples = right_PN.shape[1]
    _check_k(k, samples)
    subsets = math.comb(samples, k)
    # Python's integers are exact; their quotient is rounded once.
    chance_C = np.asarray([1 - math.comb(samples - c, k) / subsets for c in range(samples + 1)])
    return chance_C[right_PN.sum(axis=1)]


def majority_at_k(answers: Sequence[Hashable], right: Sequence[bool], k: int) -> float:
    """Probability that the most frequent answer among k of the N samples of one problem is right (arXiv 2203.11171).

    The mean over all subsets of k samples; of answers that tie each wins as often as the others. Exact: answers are
    counted, not subsets (for each number of votes that wins, polynomials in the votes of the others are multiplied).

    Args:
        answers: what each sample answers, equal where they agree (see `answers.normalise`); None casts no vote.
        right: of each sample; answers that are equal must be equally right.
        k: 1 to N.
    """
    _check_k(k, len(answers))
    votes = Counter(answer for answer in answers if answer is not None)
    verdicts = {answer: bool(verdict) for answer, verdict in zip(answers, right, strict=True)}
    consistent = all(verdicts[answer] == bool(verdict) for answer, verdict in zip(answers, right, strict=True))
    check(consistent, "right", list(right), "the same verdict wherever answers are equal")
    chances: dict[int, float] = {}
    total = 0.0
    for answer, size in votes.items():
        if answer is not None and verdicts[answer]:
            if size not in chances:
                others = sorted((votes - Counter({answer: size})).values())
                chances[size] = _chance_to_win(size, others, len(answers) - votes.total(), k)
            total += chances[size]
    return total


def _chance_to_win(own: int, others: Sequence[int], silent: int, k: int) -> float:
    """Probability that an answer of `own` samples has the most votes in k drawn; m that tie share it evenly."""
    subsets = math.comb(own + sum(others) + silent, k)
    wins = 0.0
    for most in range(1, min(own, k) + 1):
        rest = k - most
        # ways[ties, votes]: choices of the others' samples in which `ties` answers have `most` votes and none has more.
        ways = np.zeros((1, rest + 1))
        ways[0, 0] = 1
        for size in others:
            fewer = [math.comb(size, votes) for votes in range(min(size + 1, most, rest + 1))]
            below = np.stack([np.convolve(row, fewer)[: rest + 1] for row in ways])
            if most > size or most > rest:
                ways = below
                continue
            tied = np.zeros_like(ways)
            tied[:, most:] = ways[:, : rest + 1 - most] * math.comb(size, most)
            empty = np.zeros((1, rest + 1))
            ways = np.concatenate([below, empty]) + np.concatenate([empty, tied])
        silences = np.asarray([float(math.comb(silent, rest - votes)) for votes in range(rest + 1)])
        shares = 1 / np.arange(1, len(ways) + 1)
        wins += math.comb(own, most) / subsets * float(shares @ ways @ silences)
    return wins


def _check_k(k: int, samples: int) -> None:
    check(1 <= k <= samples, "k", k, f"from 1 to the number of samples, {samples}")
