"""Many runs of one program side by side: R populations of N particles, by proposal and driver."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from experiments.smc_bytes import short_words
from lmlab.core.types import Array, Key, Params
from lmlab.inference.resampling import multinomial
from lmlab.inference.smc import Arrays, Driver, FeynmanKac, History, run, standard, steering
from lmlab.inference.texts import Texts, begin, program_model
from lmlab.models.lm import LM

ARMS: dict[str, tuple[str, Driver]] = {
    "importance, plain": ("plain", standard(threshold=0)),
    "importance, optimal": ("optimal", standard(threshold=0)),
    "standard, plain": ("plain", standard()),
    "standard, optimal": ("optimal", standard()),
    "steering, plain": ("plain", steering(3)),
    "steering, optimal": ("optimal", steering(3)),
    "multinomial, optimal": ("optimal", standard(multinomial)),
    "multinomial each round, optimal": ("optimal", standard(multinomial, 1)),
}
"""Proposal and driver. With the plain proposal importance sampling is rejection sampling of N draws, with the optimal
one it is masked decoding, but for the weights that this forgets."""
TOGETHER = 1600
"""Particles that are moved at a time, as memory has room."""


@dataclass(frozen=True)
class Runs:
    """R runs of N particles that write up to T tokens."""

    log_weight_RN: np.ndarray
    log_prob_RN: np.ndarray
    """Of each text under the model."""
    tokens_RNT: np.ndarray
    fits_RN: np.ndarray
    ancestors_R: np.ndarray
    """Particles of the first round that have descendants alive at the end."""

    @property
    def log_evidences(self) -> np.ndarray:
        """Logs of the estimates of Z; -inf where all particles have died."""
        top_R = self.log_weight_RN.max(axis=1)
        with np.errstate(divide="ignore"):
            mean_R = np.log(np.mean(np.exp(self.log_weight_RN - np.maximum(top_R, -1e30)[:, None]), axis=1))
        return np.maximum(top_R, -1e30) + mean_R

    @property
    def shares(self) -> np.ndarray:
        """Weights of each run that sum to 1. NaN where all particles have died."""
        with np.errstate(invalid="ignore"):
            weight_RN = np.exp(self.log_weight_RN - self.log_weight_RN.max(axis=1, keepdims=True))
        return weight_RN / weight_RN.sum(axis=1, keepdims=True)


def draw_runs(
    lm: LM, params: Params, proposal: str, driver: Driver, prompt: bytes, key: Key, *,
    seeds: int, particles: int, tokens: int,
) -> Runs:  # fmt: skip
    """Runs from the keys that `key` is split into, some at a time."""
    program = short_words(proposal)
    state = begin(lm, params, program, [np.frombuffer(prompt, np.uint8).astype(np.int32)], particles, tokens)
    together = max(
        count for count in range(1, seeds + 1) if seeds % count == 0 and count * particles <= max(TOGETHER, particles)
    )
    keys_CR = jax.random.split(key, (seeds // together, together))
    some = partial(_runs, program_model(lm, program), driver, tokens, (params, program.tables), state)
    parts = [jax.device_get(some(keys_R)) for keys_R in keys_CR]
    return Runs(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


@partial(jax.jit, static_argnums=(0, 1, 2))
def _runs(
    model: FeynmanKac, driver: Driver, rounds: int, params: Arrays, state: Texts, keys_R: Key
) -> tuple[Array, ...]:  # fmt: skip
    def one(key: Key) -> tuple[Array, ...]:
        end = run(model, driver, params, state, key, rounds)
        texts = end.state
        ancestors = _ancestors(end.history, end.rounds, end.log_weight_P > -jnp.inf)
        return end.log_weight_P, texts.program_P["log_prob"], texts.tokens_PS, texts.program_P["fits"], ancestors

    return jax.vmap(one)(keys_R)


def _ancestors(history: History, rounds: Array, alive_P: Array) -> Array:
    def back(origin_P: Array, row: tuple[Array, Array]) -> tuple[Array, None]:
        t, parent_P = row
        return jnp.where((t > 0) & (t < rounds), parent_P[origin_P], origin_P), None

    places = jnp.arange(len(alive_P))
    times_T = jnp.arange(len(history.parent_TP))
    origin_P = jax.lax.scan(back, places, (times_T, history.parent_TP), reverse=True)[0]
    return jnp.sum(jnp.zeros(len(alive_P), bool).at[origin_P].max(alive_P))
