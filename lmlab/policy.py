"""What a run of preference learning trains, and what it keeps beside that."""

from dataclasses import replace

import jax

from lmlab.adapters import adapted, add_adapters
from lmlab.core.types import Key, Params
from lmlab.models.lm import LM
from lmlab.objectives.dpo import REFERENCE
from lmlab.recipe import Preference


def policy(config: Preference, base: LM) -> LM:
    """The model that is trained, with all that its run keeps: adapters, or a copy of the source."""
    if not has_copy(config):
        return adapted(base, config.lora)
    return replace(
        base, init=lambda key: complete(config, base, base.init(key), key),
        axes={**base.axes, REFERENCE: base.axes},
        for_decoding=lambda params: base.for_decoding({name: params[name] for name in base.axes}),
    )  # fmt: skip


def has_copy(config: Preference) -> bool:
    """Whether a copy of the source stands beside the policy."""
    return config.loss.reference == "beside" and not config.lora.rank


def complete(config: Preference, base: LM, params: Params, key: Key) -> Params:
    """The source's parameters with what is trained or kept beside them."""
    if has_copy(config):
        return {**params, REFERENCE: jax.tree.map(lambda x: x.copy(), params)}
    return add_adapters(base, config.lora, params, key)
