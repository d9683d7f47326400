"""LoRA as a model: its parameters are those of another model, which stand still, and adapters beside them."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax

from lmlab.core.rng import key_for
from lmlab.core.types import Array, Key, Params
from lmlab.models.lm import LM, Axes
from lmlab.optim.config import LoraConfig
from lmlab.optim.groups import is_names, path_name
from lmlab.optim.low_rank import Factors, lora_factors, with_products
from lmlab.optim.matrices import by_axes

ADAPTERS = "adapters"
"""The part of the parameters that is trained."""


def adapted(lm: LM, config: LoraConfig) -> LM:
    """The model with adapters of its hidden matrices; with those of rank 0 it is the model itself.

    Parameters: `{**those of lm, "adapters": {path: Factors}}`. Every call adds the products to the matrices first, at
    the cost of r tokens. So the reference of DPO is `lm` with the same parameters (`under_adapters`).
    """
    if not config.rank:
        return lm
    merged = partial(merge, lm, config)

    def apply(params: Params, inputs: Array, **options: Any) -> tuple[Array, Any]:
        return lm.apply(merged(params), inputs, **options)

    def init(key: Key) -> Params:
        return add_adapters(lm, config, lm.init(key), key)

    return replace(
        lm, init=init, apply=apply, axes={**lm.axes, ADAPTERS: _axes(lm, config)},
        for_decoding=lambda params: lm.for_decoding(merged(params)),
    )  # fmt: skip


def add_adapters(lm: LM, config: LoraConfig, params: Params, key: Key) -> Params:
    """Parameters of `lm` with fresh adapters, which change nothing yet; of rank 0 none are added."""
    if not config.rank:
        return params
    made = lora_factors(params, by_axes(lm.axes, config.include), config.rank, key_for(key, ADAPTERS))
    return {**params, ADAPTERS: made}


def merge(lm: LM, config: LoraConfig, params: Params) -> Params:
    """Parameters of `lm` that hold what the adapters have learnt."""
    base = {name: part for name, part in params.items() if name in lm.axes}
    if not config.rank:
        return base
    return with_products(base, params[ADAPTERS], by_axes(lm.axes, config.include), config.alpha / config.rank)


def still_parts(lm: LM, config: LoraConfig) -> tuple[str, ...]:
    """Parts of the parameters that are not trained (`State.still`): with adapters all but them."""
    return tuple(sorted(lm.axes)) if config.rank else ()


def moving_axes(lm: LM, trained: LM, config: LoraConfig) -> Axes:
    """Logical axes of the parameters that are trained. trained: `adapted(lm, config)`."""
    return {ADAPTERS: trained.axes[ADAPTERS]} if config.rank else trained.axes


def _axes(lm: LM, config: LoraConfig) -> dict[str, Factors]:
    """Logical axes of the adapters, which are whole on every device."""
    made = jax.eval_shape(lambda key: add_adapters(lm, config, lm.init(key), key), jax.random.key(0))[ADAPTERS]
    named = {path_name(path): names for path, names in
             jax.tree_util.tree_leaves_with_path(lm.axes, is_leaf=is_names)}  # fmt: skip

    def names(path: str, shape: tuple[int, ...], last: tuple[str, str]) -> tuple[str, ...]:
        counted = tuple(name for name in named[path] if name in ("layers", "stack"))
        return (*counted[: len(shape) - 2], *last)

    return {
        path: Factors(*(  # type: ignore[arg-type]  # names stand where the arrays will
            names(path, pair.down.shape, ("adapter_in", "adapter_rank")),
            names(path, pair.up.shape, ("adapter_rank", "adapter_out")),
        ))
        for path, pair in made.items()
    }  # fmt: skip
