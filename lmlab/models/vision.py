"""Images as rows of tokens: a class token and patches, read by any language model of the contract with no mask of time
(arXiv 2010.11929; by a TokenFormer: arXiv 2410.23168).
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from einops import rearrange

from lmlab.core.errors import check
from lmlab.core.masking import self_attention_mask
from lmlab.core.rng import key_for
from lmlab.core.types import Array, Key, Params
from lmlab.models.layers import INIT_STD
from lmlab.models.lm import LM


@dataclass(frozen=True, eq=False)
class Classifier:
    """A model of images as pure functions."""

    init: Callable[[Key], Params]
    """`init(key) -> params`."""
    logits: Callable[[Params, Array], Array]
    """`logits(params, images_BHWC) -> logits_BV`, a score for every class, in float32."""


def image_classifier(lm: LM, size: tuple[int, int, int], patch: int) -> Classifier:
    """A classifier of images of one size (height, width, channels), cut into squares of `patch` pixels.

    lm: its vocabulary are the classes; it needs learned positions, one for every patch and one for the class token,
    whose last hidden state it scores. Raises `UserError` for sizes that do not fit, as `logits` does for images.
    """
    height, width, channels = size
    check(height % patch == 0 and width % patch == 0, "patch", patch, f"a divisor of {height} and {width}")
    length = 1 + (height // patch) * (width // patch)
    check(lm.max_length >= length, "model.max_length", lm.max_length, f"at least {length}: patches and a class token")
    check(lm.config.positions == "learned", "model.positions", lm.config.positions, "learned")

    def init(key: Key) -> Params:
        trunk = lm.init(key_for(key, "trunk"))
        shape = (patch * patch * channels, lm.config.width)
        draw = lambda use, shape: INIT_STD * jax.random.normal(key_for(key, use), shape)
        return {"trunk": trunk, "patches": draw("patches", shape), "class": draw("class", shape[1:])}

    def logits(params: Params, images_BHWC: Array) -> Array:
        found = images_BHWC.shape
        check(len(found) == 4 and found[1:] == size, "images", list(found), f"[images, {height}, {width}, {channels}]")
        patches_BPX = rearrange(images_BHWC, "b (h p) (w q) c -> b (h w) (p q c)", p=patch, q=patch)
        embedded_BPD = patches_BPX @ params["patches"]
        first_B1D = jnp.broadcast_to(params["class"], (len(embedded_BPD), 1, embedded_BPD.shape[-1]))
        inputs_BTD = jnp.concatenate([first_B1D, embedded_BPD], axis=1)
        positions_BT = jnp.broadcast_to(jnp.arange(length), (len(inputs_BTD), length))
        mask = self_attention_mask(positions_BT, causal=False)
        hidden_BTD, _ = lm.apply(params["trunk"], inputs_BTD, positions_BT=positions_BT, mask=mask)
        return lm.logits(params["trunk"], hidden_BTD[:, 0])

    return Classifier(init, logits)
