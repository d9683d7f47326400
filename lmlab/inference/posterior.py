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

REPLACEMENT = "\ufffd"
"""What decoding writes for bytes that are no text."""


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
    return [continuation(codec, prompt, tokens) for tokens in particle_tokens(texts)]


def particle_tokens(texts: Texts) -> list[np.ndarray]:
    """What each particle has written, int32 [n]."""
    tokens_PS, length_P = np.asarray(texts.tokens_PS), np.asarray(texts.length_P)
    return [row[:size] for row, size in zip(tokens_PS, length_P, strict=True)]


def posterior(codec: TextCodec, prompt: np.ndarray, particles: Population) -> list[WeighedText]:
    """Texts by their probability, most probable first; nothing where all particles are dead.

    Equal texts are one, though they may be of different tokens, unless they hold bytes that are no text, which all look
    alike; one that is finished is another than one that is not.
    """
    state = written(particles.state)
    texts = particle_texts(codec, prompt, state)
    return merged(texts, particle_tokens(state), state.finished_P, particles.log_weight_P)


def merged(
    texts: Sequence[str], tokens: Sequence[np.ndarray], finished_P: Any, log_weight_P: Any
) -> list[WeighedText]:  # fmt: skip
    """The same from the texts of the particles and their tokens."""
    found: dict[tuple[str, bytes, bool], list[float]] = {}
    share_P = np.asarray(shares(jnp.asarray(log_weight_P, jnp.float32)))
    for text, spelled, finished, share in zip(texts, tokens, np.asarray(finished_P), share_P, strict=True):
        if share > 0:
            unsure = spelled.tobytes() if REPLACEMENT in text else b""
            found.setdefault((text, unsure, bool(finished)), []).append(float(share))
    weighed = [WeighedText(text, sum(parts), len(parts), finished) for (text, _, finished), parts in found.items()]
    return sorted(weighed, key=lambda one: -one.probability)


def draw_text(key: Key, texts: Sequence[WeighedText]) -> WeighedText:
    """One of the texts by its probability, where one is wanted. Raises `UserError` if there is none."""
    check(bool(texts), "posterior", "no text", "a particle that is alive")
    return texts[int(jax.random.categorical(key, jnp.log(jnp.asarray([one.probability for one in texts]))))]
