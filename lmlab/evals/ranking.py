"""How well a score ranks what is sought before what is not."""

import numpy as np


def auc(scores_N: np.ndarray, positive_N: np.ndarray) -> float:
    """The probability that a positive has the higher score; of a tie half. NaN without both kinds."""
    if positive_N.all() or not positive_N.any():
        return float("nan")
    _, place, counts = np.unique(scores_N, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]
    wins = ranks[positive_N].sum() - positive_N.sum() * (positive_N.sum() + 1) / 2
    return float(wins / (positive_N.sum() * (~positive_N).sum()))
