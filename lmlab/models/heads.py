"""Several heads on one trunk: each predicts one token further ahead (arXiv 2404.19737).

The first head with the trunk is a decoder like any other, and its parameters lie as there; those of head i > 1 are
beside them under `head_i`. So the heads can be dropped, or added to a model that was trained without.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lmlab.core.masking import AttentionMask, self_attention_mask
from lmlab.core.types import Array, Key, Params
from lmlab.models import cache as caches
from lmlab.models import tokenformer, transformer
from lmlab.models.build import language_model
from lmlab.models.cache import KVCache
from lmlab.models.config import DecoderConfig, ModelConfig, TokenFormerConfig
from lmlab.models.decoder import (
    Block,
    Carry,
    Decoder,
    check_length,
    decodes_apart,
    enter_tokens,
    lay_apart,
    logical_axes,
    next_positions,
    rematerialised,
)
from lmlab.models.heads_config import MultiTokenConfig, of_depth
from lmlab.models.layers import Linear, Norm
from lmlab.models.lm import LM, Axes, MultiTokenLM, Reading
from lmlab.models.rotary import rotary_table, stand_still


class Trunk(Decoder):
    """A decoder whose output is not normed."""

    def setup(self) -> None:
        """Declare the parameters."""
        super().setup()
        self.final_norm: Any = lambda x_BTD: x_BTD


class LayerHead(nn.Module):
    """A layer of its own."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, carry: Carry, following_BTD: None, layer: int, table: tuple[Array, Array] | None, mask: AttentionMask,
        places_BT: Array | None,
    ) -> Carry:  # fmt: skip
        """[B, T, D] of the trunk -> [B, T, D]."""
        del following_BTD
        return _apart_block(self.config)(self.config, name="block")(carry, layer, table, mask, places_BT)[0]


class LinearHead(nn.Module):
    """A matrix [D, D]."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, carry: Carry, *rest: Any) -> Carry:
        """[B, T, D] of the trunk -> [B, T, D]."""
        del rest
        # The shared norm follows: the size of the matrix means nothing.
        return Linear({"embed": self.config.width}, {"norm": self.config.width}, name="matrix")(carry[0]), carry[1]


class SequentialHead(nn.Module):
    """Block(M [norm(h); norm(embedding of the token that the head before predicts)]), arXiv 2412.19437 eq. 21-22."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, carry: Carry, following_BTD: Array, layer: int, table: tuple[Array, Array] | None, mask: AttentionMask,
        places_BT: Array | None,
    ) -> Carry:  # fmt: skip
        """[B, T, D] of the head before -> [B, T, D]."""
        config, (x_BTD, cache) = self.config, carry
        norm = lambda name: Norm(config.norm, config.norm_eps, name=name)
        both_BT2D = jnp.stack([norm("hidden_norm")(x_BTD), norm("embedding_norm")(following_BTD)], axis=2)
        x_BTD = Linear({"stack": 2, "embed": config.width}, {"norm": config.width}, name="merge")(both_BT2D)
        return _apart_block(config)(config, name="block")((x_BTD, cache), layer, table, mask, places_BT)[0]


HEADS: dict[str, type[nn.Module]] = {
    "parallel": LayerHead,
    "causal": LayerHead,
    "linear": LinearHead,
    "sequential": SequentialHead,
}


def _block(config: DecoderConfig) -> Block:
    """The layer of the decoder that a config describes."""
    return tokenformer.Block if isinstance(config, TokenFormerConfig) else transformer.Block


def _apart_block(config: DecoderConfig) -> Block:
    return rematerialised(_block(config), replace(config.execution, stacked=False))


def head_name(number: int) -> str:
    """Where the parameters of head i > 1 lie."""
    return f"head_{number}"


def drop_heads(params: Params) -> Params:
    """The parameters of head 1 alone: those of a decoder of `MultiTokenConfig.depth` layers."""
    return {name: leaf for name, leaf in params.items() if not name.startswith("head_")}


def add_heads(config: MultiTokenConfig, params: Params, key: Key) -> Params:
    """Further heads for a decoder, `config.first`, that was trained without. Pure: may be traced.

    Heads that are layers begin as copies of its last one, the others fresh. Inverse of `drop_heads`.
    """
    fresh = multi_token_lm(config).lm.init(key)
    heads = {name: leaf for name, leaf in fresh.items() if name.startswith("head_")}
    if config.own_layers:
        last = _layer(config, params, config.depth - 1)
        heads = {name: {"block": jax.tree.map(jnp.copy, last)} for name in heads}
    return {**params, **heads}


def _layer(config: MultiTokenConfig, params: Params, number: int) -> Params:
    """Parameters of one layer."""
    if config.model.execution.stacked:
        return jax.tree.map(lambda x: x[number], params["layers"])
    return params[f"layers_{number}"]


def multi_token_lm(config: MultiTokenConfig) -> MultiTokenLM:
    """The record of a model with `config.heads` heads. Raises `UserError` if the vocabulary is not known yet."""
    model, depth = config.first, config.depth
    base = language_model(model)
    read, head = _read(config, model), _head(config, model, base)
    numbers = range(2, config.heads + 1)

    def apply(params: Params, inputs: Array, **rest: Any) -> tuple[Array, KVCache | None]:
        reading = read(params, inputs, **rest)
        first_BTD, reading = head(params, 1, reading, inputs)
        for number in numbers:
            # What follows the last token is not known yet: see `MultiTokenLM.whole`.
            ahead = jnp.zeros_like(inputs).at[:, : 1 - number].set(inputs[:, number - 1 :])
            _, reading = head(params, number, reading, ahead)
        return first_BTD, reading.cache

    def init_cache(batch: int, length: int) -> KVCache:
        check_length(model, length)
        dtype = jnp.dtype(model.execution.compute_dtype)
        layers = depth + (0 if config.chain == "linear" else config.heads - 1)
        return caches.empty_cache(
            layers, batch, length, model.kv_heads, model.head_dim, dtype, model.execution.stacked
        )  # fmt: skip

    def for_decoding(params: Params) -> tuple[MultiTokenLM, Params]:
        return (_apart(config), lay_apart(params, depth)) if decodes_apart(model) else (made, params)

    def whole_for_decoding(params: Params) -> tuple[LM, Params]:
        several, params = for_decoding(params)
        return several.whole, params

    init, axes = _init(config, model, base)
    lm = replace(
        base, init=init, axes=axes, for_decoding=lambda params: base.for_decoding(drop_heads(params))
    )  # fmt: skip
    whole = replace(lm, apply=apply, init_cache=init_cache, for_decoding=whole_for_decoding)
    made = MultiTokenLM(lm, config.heads, read, head, whole, for_decoding)
    return made


@lru_cache
def _apart(config: MultiTokenConfig) -> MultiTokenLM:
    """The same model with each layer's parameters apart; nothing is differentiated, so nothing is computed again."""
    execution = replace(config.model.execution, stacked=False, remat="none")
    return multi_token_lm(replace(config, model=replace(config.model, execution=execution)))


def _init(config: MultiTokenConfig, model: ModelConfig, base: LM) -> tuple[Callable[[Key], Params], Axes]:
    """The initialiser of all parameters, and the names of their axes. Head 1 is as it would be alone."""
    module = HEADS[config.chain](model)

    def boxed(key: Key) -> Params:
        places = jnp.zeros((1, 1), jnp.int32)
        x = jnp.zeros((1, 1, model.width), jnp.float32)
        table = rotary_table(model.rotary, model.head_dim, places) if model.positions == "rotary" else None
        return module.init(key, (x, None), x, 0, table, self_attention_mask(places), None)["params"]

    @jax.jit
    def init(key: Key) -> Params:
        names = range(2, config.heads + 1)
        return {**base.init(key), **{head_name(i): nn.unbox(boxed(jax.random.fold_in(key, i))) for i in names}}

    axes = logical_axes(boxed)
    return init, {**base.axes, **{head_name(i): axes for i in range(2, config.heads + 1)}}


def _read(config: MultiTokenConfig, model: ModelConfig) -> Callable[..., Reading]:
    """See `lmlab.models.lm.Read`."""
    layers = config.depth - (1 if config.own_layers else 0)
    trunk = Trunk(of_depth(model, layers), _block(model))

    def read(
        params: Params, inputs: Array, *, positions_BT: Array | None = None, segments_BT: Array | None = None,
        mask: AttentionMask | None = None, cache: KVCache | None = None,
    ) -> Reading:  # fmt: skip
        check_length(model, inputs.shape[1])
        positions_BT = next_positions(inputs, cache) if positions_BT is None else positions_BT
        default, cache, places_BT = enter_tokens(model, cache, positions_BT, segments_BT)
        mask = mask or default
        if model.execution.stacked:
            params = {**params, "layers": jax.tree.map(lambda x: x[:layers], params["layers"])}
        made: Any = trunk.apply({"params": params}, inputs, positions_BT, mask, cache, places_BT)
        x_BTD, cache = made
        table = rotary_table(model.rotary, model.head_dim, positions_BT) if model.positions == "rotary" else None
        if table and config.depth - 1 in model.rotary.skipped_layers:
            table = stand_still(table, jnp.asarray(True))
        return Reading(x_BTD.astype(jnp.float32), x_BTD, mask, table, places_BT, cache)

    return read


def _head(
    config: MultiTokenConfig, model: ModelConfig, base: LM
) -> Callable[[Params, int, Reading, Array], tuple[Array, Reading]]:  # fmt: skip
    """See `MultiTokenLM.head`."""
    first, further = _apart_block(model)(model), HEADS[config.chain](model)
    norm = Norm(model.norm, model.norm_eps)
    dtype = jnp.dtype(model.execution.compute_dtype)

    def embed(params: Params, inputs: Array) -> Array:
        return (base.embed(params, inputs) if jnp.issubdtype(inputs.dtype, jnp.integer) else inputs).astype(dtype)

    def head(params: Params, number: int, reading: Reading, following: Array) -> tuple[Array, Reading]:
        chained = number > 1 and config.chain in ("causal", "sequential")
        x_BTD = reading.chain_BTD if chained else reading.trunk_BTD.astype(dtype)
        carry: Any = (x_BTD, reading.cache)
        layer = config.depth + number - 2
        where = layer, reading.table, reading.mask, reading.places_BT
        if number > 1:
            following_BTD = embed(params, following) if config.chain == "sequential" else None
            carry = further.apply({"params": params[head_name(number)]}, carry, following_BTD, *where)
        elif config.own_layers:
            stepped: Any = first.apply({"params": _layer(config, params, layer)}, carry, *where)
            carry = stepped[0]
        hidden_BTD: Any = norm.apply({"params": params["final_norm"]}, carry[0])
        return hidden_BTD, replace(reading, chain_BTD=carry[0], cache=carry[1])

    return head
