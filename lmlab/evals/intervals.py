"""How sure a mean over problems is."""

import math

import jax
import numpy as np

from lmlab.core.errors import check
from lmlab.core.types import Key


def standard_error(values_N: np.ndarray) -> float:
    """Standard error of the mean: the sample's standard deviation by sqrt(N); NaN for one value."""
    return float(np.std(values_N, ddof=1) / math.sqrt(len(values_N))) if len(values_N) > 1 else math.nan


def bootstrap_interval(
    values_N: np.ndarray, key: Key, *, level: float = 0.95, resamples: int = 2000
) -> tuple[float, float]:  # fmt: skip
    """Percentile bootstrap of the mean: the middle `level` of the means of samples of N values drawn with replacement.

    The values are one a problem, and problems are what is drawn: samples of one problem are not independent.
    Source: Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13.
    """
    check(len(values_N) >= 1, "values", [], "one value a problem, at least one")
    check(0 < level < 1, "level", level, "between 0 and 1")
    picks_RN = jax.random.randint(key, (resamples, len(values_N)), 0, len(values_N))
    means_R = np.asarray(values_N, np.float64)[np.asarray(picks_RN)].mean(axis=1)
    low, high = np.quantile(means_R, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
