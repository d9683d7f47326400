"""The posterior over texts that weighted particles stand for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmlab.core.errors import check
from lmlab.core.types import Key
from lmlab.inference.blocks import Blocks
from lmlab.inference.resampling import shares
from lmlab.inference.smc import Population
from lmlab.inference.text import TextCodec, continuation
from lmlab.inference.texts import Texts


@dataclass(frozen=True)
class WeighedText:
    """One text, whatever tokens its particles have written it with."""

    text: str
    probability: float
    """That of its particles together."""
    particles: int
    """How many have written it."""
    finished: bool
    """Whether the program has ended it; otherwise it ends where the room for tokens does."""


def written(state: Any) -> Texts:
    """What the particles of a program have written, whether or not their rounds are blocks."""
    return state.inner if isinstance(state, Blocks) else state


def particle_texts(codec: TextCodec, prompt: np.ndarray, texts: Texts) -> list[str]:
    """The text of each particle after the prompt of context 0, int32 [n]."""
    tokens_PS, length_P = np.asarray(texts.tokens_PS), np.asarray(texts.length_P)
    return [continuation(codec, prompt, row[:size]) for row, size in zip(tokens_PS, length_P, strict=True)]


def posterior(codec: TextCodec, prompt: np.ndarray, particles: Population) -> list[WeighedText]:
    """Texts by their probability, most probable first; nothing where all particles are dead.

    Equal texts are one, though they may be of different tokens; one that is finished is another than one that is not.
    """
    state = written(particles.state)
    return merged(particle_texts(codec, prompt, state), state.finished_P, particles.log_weight_P)


def merged(texts: Sequence[str], finished_P: Any, log_weight_P: Any) -> list[WeighedText]:
    """The same from the texts of the particles."""
    found: dict[tuple[str, bool], list[float]] = {}
    share_P = np.asarray(shares(jnp.asarray(log_weight_P, jnp.float32)))
    for text, finished, share in zip(texts, np.asarray(finished_P), share_P, strict=True):
        if share > 0:
            found.setdefault((text, bool(finished)), []).append(float(share))
    weighed = [WeighedText(text, sum(parts), len(parts), finished) for (text, finished), parts in found.items()]
    return sorted(weighed, key=lambda one: -one.probability)


def draw_text(key: Key, texts: Sequence[WeighedText]) -> WeighedText:
    """One of the texts by its probability, where one is wanted. Raises `UserError` if there is none."""
    check(bool(texts), "posterior", "no text", "a particle that is alive")
    return texts[int(jax.random.categorical(key, jnp.log(jnp.asarray([one.probability for one in texts]))))]
