"""What is kept of every round on the host, and of the whole in the end."""

from dataclasses import dataclass

import jax
import numpy as np

from lmlab.core.types import Array
from lmlab.inference.posterior import WeighedText, merged, particle_texts, particle_tokens, written
from lmlab.inference.resampling import effective_size
from lmlab.inference.smc import Population
from lmlab.inference.text import TextCodec


@dataclass(frozen=True)
class Round:
    """Particles after a round. Which children they were is in the history of the last population."""

    parent_P: np.ndarray
    child_P: np.ndarray
    tokens: list[list[int]]
    """What each has written in it; nothing where it is finished or has died."""
    length_P: np.ndarray
    finished_P: np.ndarray
    """By the program."""
    log_weight_P: np.ndarray
    share_P: np.ndarray
    log_evidence: float
    """-inf where all are dead."""
    effective: float
    """Effective number of particles."""


@dataclass(frozen=True)
class Outcome:
    """All that is told of a run."""

    prompts: list[str]
    rounds: list[Round]
    texts: list[str]
    """Of the particles."""
    finished_P: np.ndarray
    log_weight_P: np.ndarray
    """Their own: no guess at a future is in it."""
    share_P: np.ndarray
    log_evidence: float
    effective: float
    posterior: list[WeighedText]
    moves_TPK: np.ndarray | None
    """Tokens of all children; None where a round may write several."""
    child_weight_TPK: np.ndarray
    kept_weight_TP: np.ndarray
    """log-weights of those that went on, what twists have lent them included."""
    child_effective_T: np.ndarray
    """Effective number of children before any was chosen."""
    seconds: float
    """That the rounds took after the first, which compiles."""
    stopped_by: str
    """Name of a signal; empty: none."""

    @property
    def anew(self) -> list[bool]:
        """Rounds after which not all living children went on as they were."""
        each = zip(self.rounds, self.child_weight_TPK, self.kept_weight_TP, strict=True)
        return [_chosen_anew(*one) for one in each]

    @property
    def written(self) -> int:
        """Tokens of all particles in these seconds."""
        return sum(len(tokens) for one in self.rounds[1:] for tokens in one.tokens)


def _chosen_anew(one: Round, weight_PK: np.ndarray, kept_P: np.ndarray) -> bool:
    alive_P = kept_P > -np.inf
    chosen = set(zip(one.parent_P[alive_P].tolist(), one.child_P[alive_P].tolist(), strict=True))
    same = np.allclose(weight_PK[one.parent_P, one.child_P][alive_P], kept_P[alive_P], atol=1e-5)
    return bool(len(chosen) < np.sum(weight_PK > -np.inf) or not same)


@jax.jit
def _figures(particles: Population) -> tuple[Array, Array, Array]:
    return particles.probabilities, particles.log_evidence, effective_size(particles.log_weight_P)


def read_round(particles: Population, before: Round | None) -> Round:
    """The newest round of a population; `before` is the one before it."""
    texts, made = written(particles.state), int(particles.rounds)
    state = texts.tokens_PS, texts.length_P, texts.finished_P, particles.log_weight_P
    whose = particles.history.parent_TP, particles.history.child_TP
    # Copies: what the next round is made of is not to be held on to.
    tokens_PS, length_P, finished_P, log_weight_P = map(np.array, jax.device_get(state))
    parent_TP, child_TP = map(np.array, jax.device_get(whose))
    share_P, log_evidence, effective = map(np.array, jax.device_get(_figures(particles)))
    parent_P = parent_TP[made - 1]
    old_P = np.zeros_like(length_P) if before is None else before.length_P[parent_P]
    tokens = [row[old:new].tolist() for row, old, new in zip(tokens_PS, old_P, length_P, strict=True)]
    return Round(
        parent_P, child_TP[made - 1], tokens, length_P, finished_P, log_weight_P, share_P, float(log_evidence),
        float(effective),
    )  # fmt: skip


def conclude(
    particles: Population, rounds: list[Round], codec: TextCodec, prompts: list[np.ndarray], shown: list[str],
    seconds: float, stopped_by: str,
) -> Outcome:  # fmt: skip
    """The outcome of the last population, whose weights are its own. shown: the prompts as text."""
    texts = written(particles.state)
    finished_P = np.asarray(texts.finished_P)
    history = jax.device_get(particles.history)
    share_P, log_evidence, effective = jax.device_get(_figures(particles))
    log_weight_P = np.asarray(particles.log_weight_P)
    each = particle_texts(codec, prompts[0], texts)
    made = len(rounds)
    moves = history.moves_TPK
    return Outcome(
        prompts=shown, rounds=rounds, texts=each, finished_P=finished_P, log_weight_P=log_weight_P,
        share_P=share_P, log_evidence=float(log_evidence), effective=float(effective),
        posterior=merged(each, particle_tokens(texts), finished_P, log_weight_P),
        moves_TPK=None if moves is None else moves[:made], child_weight_TPK=history.child_weight_TPK[:made],
        kept_weight_TP=history.log_weight_TP[:made],
        child_effective_T=history.effective_T[:made], seconds=seconds, stopped_by=stopped_by,
    )  # fmt: skip
