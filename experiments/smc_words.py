"""Words of at most 4 letters for 24 bytes: every sampler beside exact texts, which rejection sampling finds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.results import say
from experiments.smc_arms import ARMS, Runs, draw_runs
from experiments.smc_bytes import END, LONGEST, byte_model, held_out_prompts, letters_after
from lmlab.core.errors import check
from lmlab.core.types import Params
from lmlab.inference.smc import standard
from lmlab.models.lm import LM

TOKENS = 24
MASKED = "masked decoding"
"""The runs of importance sampling with the optimal proposal, all texts of one weight."""
BATCH = 1024
"""Draws of rejection sampling at a time."""


@dataclass(frozen=True)
class Sizes:
    """How much is drawn."""

    steps: int
    prompts: int
    seeds: int
    particles: tuple[int, ...]
    draws: int
    """Of rejection sampling, for each prompt."""
    arms: tuple[str, ...] = tuple(ARMS)


@dataclass(frozen=True)
class Exact:
    """What rejection sampling has found after one prompt."""

    draws: int
    log_prob_M: np.ndarray
    first_M: dict[str, np.ndarray]
    """Bins of the accepted texts, by histogram."""

    @property
    def log_evidence(self) -> float:
        """Of the share that was accepted."""
        return math.log(len(self.log_prob_M) / self.draws)

    @property
    def error(self) -> float:
        """Standard error of that."""
        share = len(self.log_prob_M) / self.draws
        return math.sqrt((1 - share) / (share * self.draws))


def run_words(folder: Path, sizes: Sizes) -> dict[str, Any]:
    """Train the model or find it trained, draw exact texts, and measure every arm by number of particles."""
    lm, params = byte_model(folder / f"model_{sizes.steps}", sizes.steps)
    prompts = held_out_prompts(sizes.prompts)
    exact = [rejected(lm, params, prompt, sizes.draws, seed) for seed, prompt in enumerate(prompts)]
    result: dict[str, Any] = {
        "prompts": [prompt.decode(errors="replace") for prompt in prompts],
        "exact": [{"log_evidence": one.log_evidence, "error": one.error, "accepted": len(one.log_prob_M),
                   "log_prob": float(one.log_prob_M.mean())} for one in exact],
        "floor": floors(exact, sizes.seeds), "arms": {},
    }  # fmt: skip
    for name in sizes.arms:
        proposal, driver = ARMS[name]
        for particles in sizes.particles:
            say(f"{name}, {particles} particles")
            runs = [
                draw_runs(lm, params, proposal, driver, prompt, jax.random.key(1000 + seed), seeds=sizes.seeds,
                          particles=particles, tokens=TOKENS)
                for seed, prompt in enumerate(prompts)
            ]  # fmt: skip
            keep = result["arms"].setdefault
            keep(name, {})[str(particles)] = evidence(runs, exact) | quality(runs, exact) | ancestors(runs)
            if name == "importance, optimal":
                keep(MASKED, {})[str(particles)] = quality([forgetful(one) for one in runs], exact)
    return result


def rejected(lm: LM, params: Params, prompt: bytes, draws: int, seed: int) -> Exact:
    """Texts of the model that do. Whole batches are drawn, and at least so many texts."""
    say(f"rejection sampling, prompt {seed + 1}")
    runs = draw_runs(lm, params, "free", standard(threshold=0), prompt, jax.random.key(seed),
                     seeds=-(-draws // BATCH), particles=BATCH, tokens=TOKENS)  # fmt: skip
    fits = runs.fits_RN.reshape(-1)
    check(bool(fits.any()), "--draws", draws, f"enough that one of them fits after {prompt.decode(errors='replace')!r}")
    tokens_MT = runs.tokens_RNT.reshape(len(fits), -1)[fits]
    return Exact(len(fits), runs.log_prob_RN.reshape(-1)[fits], bins(tokens_MT))


def bins(tokens_NT: np.ndarray) -> dict[str, np.ndarray]:
    """What a text begins with: its first byte, and how many letters there are before anything else."""
    letter_NT = np.asarray(letters_after())[0][tokens_NT[:, : LONGEST + 1]] > 0
    return {"first byte": tokens_NT[:, 0], "first letters": np.cumprod(letter_NT, axis=1).sum(axis=1)}


def histogram(bins_N: np.ndarray, weight_N: np.ndarray | None = None) -> np.ndarray:
    """Shares of the bins."""
    count_B = np.bincount(bins_N, weight_N, minlength=END + 1)
    return count_B / count_B.sum()


def distance(histograms: Sequence[np.ndarray], exact: Sequence[np.ndarray]) -> float:
    """Total variation of the mixtures over prompts."""
    return float(np.abs(np.mean(histograms, axis=0) - np.mean(exact, axis=0)).sum() / 2)


def floors(exact: Sequence[Exact], seeds: int) -> dict[str, dict[str, float]]:
    """Distances that chance makes: of two halves of the exact texts, and of as many exact texts as an arm has runs from
    all of them, the mean of 200 times.
    """
    found: dict[str, dict[str, float]] = {}
    rng = np.random.default_rng(0)
    for kind in exact[0].first_M:
        bins_PM = [one.first_M[kind] for one in exact]
        halves = [[histogram(bins_M[i::2]) for bins_M in bins_PM] for i in range(2)]
        whole = [histogram(bins_M) for bins_M in bins_PM]
        few = [distance([histogram(rng.choice(bins_M, seeds)) for bins_M in bins_PM], whole) for _ in range(200)]
        found[kind] = {"halves": distance(*halves), "one text a run": float(np.mean(few))}
    return found


def forgetful(runs: Runs) -> Runs:
    """The same with equal weights."""
    return Runs(np.zeros_like(runs.log_weight_RN), runs.log_prob_RN, runs.tokens_RNT, runs.fits_RN, runs.ancestors_R)


def evidence(runs: Sequence[Runs], exact: Sequence[Exact]) -> dict[str, Any]:
    """Of log Z-hat less the exact log Z the mean over prompts and seeds (None: minus infinity), and of the runs with
    a particle alive; of Z-hat / Z the mean. Errors are those of the mean, the exact value's included.
    """
    gap_PR = np.stack([one.log_evidences - true.log_evidence for one, true in zip(runs, exact, strict=True)])
    alive_PR = gap_PR > -np.inf
    true = math.sqrt(sum(one.error**2 for one in exact)) / len(exact)
    ratio_PR = np.exp(gap_PR)
    own = lambda x: float(np.std(x, ddof=1) / math.sqrt(np.size(x))) if np.size(x) > 1 else 0.0
    mean = float(gap_PR[alive_PR].mean()) if alive_PR.any() else None
    return {
        "log_gap": mean if alive_PR.all() else None, "log_gap_alive": mean, "log_gap_error": own(gap_PR[alive_PR]),
        "dead": float(1 - alive_PR.mean()), "ratio": float(ratio_PR.mean()),
        "ratio_error": math.hypot(math.sqrt(float(ratio_PR.var(axis=1, ddof=1).mean()) / ratio_PR.size), true),
    }  # fmt: skip


def quality(runs: Sequence[Runs], exact: Sequence[Exact]) -> dict[str, Any]:
    """Of a text drawn by weight from a run that has any: its log-probability under the model less that of exact texts
    (None: no run has any), and how far the beginnings of such texts are from those of exact ones.
    """
    gaps, errors, drawn = [], [], {kind: [] for kind in exact[0].first_M}
    some = [(one, true, one.log_evidences > -np.inf) for one, true in zip(runs, exact, strict=True)]
    some = [found for found in some if found[2].any()]
    for one, true, alive_R in some:
        share_RN = one.shares[alive_R]
        mean_R = (share_RN * one.log_prob_RN[alive_R]).sum(axis=1)
        gaps.append(mean_R.mean() - true.log_prob_M.mean())
        errors.append(mean_R.var() / len(mean_R) + true.log_prob_M.var() / len(true.log_prob_M))
        for kind, bins_M in bins(one.tokens_RNT[alive_R].reshape(share_RN.size, -1)).items():
            drawn[kind].append(histogram(bins_M, share_RN.reshape(-1)))
    far = {
        kind: distance(histograms, [histogram(true.first_M[kind]) for _, true, _ in some])
        for kind, histograms in drawn.items()
        if histograms
    }
    error = math.sqrt(sum(errors)) / max(len(errors), 1)
    return {"log_prob_gap": float(np.mean(gaps)) if gaps else None, "log_prob_error": error, "far": far}


def ancestors(runs: Sequence[Runs]) -> dict[str, float]:
    """Of runs with a particle alive the mean number of those of round 1 with descendants at the end, and of texts."""
    alive = [one.log_weight_RN > -np.inf for one in runs]
    texts = [
        len({text.tobytes() for text in tokens_NT[alive_N]})
        for one, alive_RN in zip(runs, alive, strict=True)
        for tokens_NT, alive_N in zip(one.tokens_RNT, alive_RN, strict=True)
        if alive_N.any()
    ]
    lines = np.concatenate([one.ancestors_R for one in runs])
    return {"ancestors": float(lines[lines > 0].mean()) if lines.any() else 0.0, "texts": float(np.mean(texts or [0]))}
