"""What every decoder shares: embedding, layers, final norm, cache, mask; an LM record around one kind of block."""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import linen as nn

from lmlab.core.errors import check
from lmlab.core.masking import AttentionMask, self_attention_mask
from lmlab.core.sharding import constrain, platform
from lmlab.core.types import Array, Key, Params
from lmlab.models import cache as caches
from lmlab.models.cache import KVCache
from lmlab.models.config import DecoderConfig, ExecutionConfig
from lmlab.models.layers import INIT_STD, PROJECTION, Norm, kernel_init
from lmlab.models.lm import LM, Axes
from lmlab.models.projection import look_up, project
from lmlab.models.rotary import rotary_table

Carry: TypeAlias = tuple[Array, KVCache | None]
"""The residual stream, and the cache of which each layer writes its own slice."""
Block: TypeAlias = type[nn.Module]
"""One layer: `Block(config)(carry, layer, rotary table or None, mask, places_BT or None) -> (carry, None)`."""
TABLE = ("vocab", "embed")
"""Logical axes of the embedding and the unembedding."""
STREAM = ("batch", "length", None)
"""Of the residual stream."""


class Decoder(nn.Module):
    """Embedding, layers, final norm. Layers are a scan over parameters stacked along a first axis, or lie apart."""

    config: DecoderConfig
    block: Block

    def setup(self) -> None:
        """Declare the parameters."""
        config = self.config
        self.embedding = self.param(
            "embedding", kernel_init(TABLE, config.embedding_std), (config.vocab_size, config.width)
        )
        if not config.tied:
            self.unembedding = self.param(
                "unembedding", kernel_init(TABLE, config.embedding_std), (config.vocab_size, config.width)
            )
        if config.positions == "learned":
            self.position_embedding = self.param(
                "position_embedding",
                kernel_init(("positions", "embed"), INIT_STD / 2),
                (config.max_length, config.width),
            )
        self.layers = _layers(config, self.block)
        self.final_norm = Norm(config.norm, config.norm_eps)

    def embed(self, tokens_BT: Array) -> Array:
        """Rows of the embedding, in the compute type."""
        return look_up(self.embedding, tokens_BT, TABLE, self.config.execution.compute_dtype)

    def __call__(
        self,
        inputs: Array,
        positions_BT: Array,
        mask: AttentionMask,
        cache: KVCache | None,
        places_BT: Array | None,
    ) -> tuple[Array, KVCache | None]:
        """See `lmlab.models.lm.Apply`."""
        config = self.config
        x_BTD = self.embed(inputs) if jnp.issubdtype(inputs.dtype, jnp.integer) else inputs
        x_BTD = x_BTD.astype(config.execution.compute_dtype)
        table = None
        if config.positions == "learned":
            x_BTD = x_BTD + look_up(self.position_embedding, positions_BT, ("positions", "embed"), x_BTD.dtype)
        elif config.positions == "rotary":
            table = rotary_table(config.rotary, config.head_dim, positions_BT)
        carry = constrain(x_BTD, STREAM), cache
        if isinstance(self.layers, nn.Module):
            carry, _ = self.layers(carry, jnp.arange(config.layers), table, mask, places_BT)
        else:
            for number, block in enumerate(self.layers):
                carry, _ = block(carry, number, table, mask, places_BT)
        x_BTD, cache = carry
        return self.final_norm(x_BTD), cache


def _layers(config: DecoderConfig, block: Block) -> Any:
    """One module that scans over the layers, or a module for each."""
    block = rematerialised(block, config.execution)
    if not config.execution.stacked:
        return [block(config) for _ in range(config.layers)]
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
        length=config.layers,
        unroll=config.execution.unroll or config.layers,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )(config)


def rematerialised(block: Block, execution: ExecutionConfig) -> Block:
    """The layer as one whose activations are computed again in the backward pass, as `execution.remat` says."""
    if execution.remat == "none":
        return block
    policies = {"dots": jax.checkpoint_policies.save_only_these_names(PROJECTION), "full": None}
    # Inside a scan nothing can merge the recomputation with the forward pass, so no barrier is needed; outside of it
    # the layer's number is an int, and stays one.
    static = () if execution.stacked else (2,)
    return nn.remat(
        block, policy=policies[execution.remat], prevent_cse=not execution.stacked, static_argnums=static
    )  # fmt: skip


def decoder_lm(config: DecoderConfig, block: Block) -> LM:
    """The LM record of a decoder of such layers. Raises `UserError` if the vocabulary is not known yet."""
    check(config.vocab_size >= 1, "model.vocab_size", config.vocab_size, "the number of tokens of the tokenizer")
    module = Decoder(config, block)
    table = "embedding" if config.tied else "unembedding"

    def run(params: Params, *args: Any, method: str | None = None) -> Any:
        return module.apply({"params": params}, *args, method=method)

    def boxed(key: Key) -> Params:
        positions = jnp.zeros((1, 1), jnp.int32)
        return module.init(key, positions, positions, self_attention_mask(positions), None, None)["params"]

    def apply(
        params: Params, inputs: Array, *, positions_BT: Array | None = None, segments_BT: Array | None = None,
        mask: AttentionMask | None = None, cache: KVCache | None = None,
    ) -> tuple[Array, KVCache | None]:  # fmt: skip
        check_length(config, inputs.shape[1])
        positions_BT = next_positions(inputs, cache) if positions_BT is None else positions_BT
        default, cache, places_BT = enter_tokens(config, cache, positions_BT, segments_BT)
        return run(params, inputs, positions_BT, mask or default, cache, places_BT)

    def logits(params: Params, hidden: Array) -> Array:
        return config.logit_scale * project(hidden, params[table].T, TABLE[::-1], 1, jnp.float32)

    def init_cache(batch: int, length: int) -> KVCache:
        check_length(config, length)
        dtype = jnp.dtype(config.execution.compute_dtype)
        return caches.empty_cache(
            config.layers, batch, length, config.kv_heads, config.head_dim, dtype, config.execution.stacked
        )

    def for_decoding(params: Params) -> tuple[LM, Params]:
        if not decodes_apart(config):
            return lm, params
        return _apart(config, block), lay_apart(params, config.layers)  # type: ignore[arg-type]  # a class is hashable

    lm = LM(
        config=config, vocab_size=config.vocab_size, max_length=config.max_length,
        # One program: operation by operation, a fresh model takes seconds to compile.
        init=jax.jit(lambda key: nn.unbox(boxed(key))), apply=apply,
        embed=lambda params, tokens_BT: run(params, tokens_BT, method="embed"),
        head=lambda params: {table: params[table]}, logits=logits, init_cache=init_cache, take_rows=caches.take_rows,
        put_rows=caches.put_rows, rewind=caches.rewind, resize=caches.resize, for_decoding=for_decoding,
        axes=logical_axes(boxed),
    )  # fmt: skip
    return lm


def logical_axes(boxed: Callable[[Key], Params]) -> Axes:
    """The names of the axes of parameters that are made with their names around them."""
    names = nn.get_partition_spec(jax.eval_shape(boxed, jax.random.key(0)))
    return jax.tree.map(tuple, names, is_leaf=lambda leaf: isinstance(leaf, jax.sharding.PartitionSpec))


def next_positions(inputs: Array, cache: KVCache | None) -> Array:
    """[B, T] the places of tokens in their row, after what the cache holds."""
    start = jnp.zeros((len(inputs), 1), jnp.int32) if cache is None else cache.length_B[:, None]
    return start + jnp.arange(inputs.shape[1], dtype=jnp.int32)[None]


def enter_tokens(
    config: DecoderConfig, cache: KVCache | None, positions_BT: Array, segments_BT: Array | None
) -> tuple[AttentionMask, KVCache | None, Array | None]:  # fmt: skip
    """The causal mask; with a cache over all that it holds, the cache with the tokens entered, and their places."""
    window = config.attention.window or None
    if cache is None:
        return self_attention_mask(positions_BT, segments_BT, window=window), None, None
    if segments_BT is None:
        segments_BT = jnp.ones(positions_BT.shape, jnp.int32)
    cache, places_BT = caches.claim_places(cache, positions_BT, segments_BT)
    mask = AttentionMask(positions_BT, cache.positions_BS, segments_BT, cache.segments_BS, window=window)
    return mask, cache, places_BT


def decodes_apart(config: DecoderConfig) -> bool:
    """Whether the form that draws tokens fastest on this machine is another: one whose layers lie apart."""
    return config.execution.stacked and platform() == "cpu"


@lru_cache
def _apart(config: DecoderConfig, block: Block) -> LM:
    """The same model with each layer's parameters apart; nothing is differentiated, so nothing is computed again."""
    return decoder_lm(replace(config, execution=replace(config.execution, stacked=False, remat="none")), block)


@partial(jax.jit, static_argnums=1)
def lay_apart(params: Params, layers: int) -> Params:
    """The parameters with those of each layer apart."""
    rest = {name: leaf for name, leaf in params.items() if name != "layers"}
    layer = lambda i: jax.tree.map(lambda x: x[i], params["layers"])
    return rest | {f"layers_{i}": layer(i) for i in range(layers)}


def check_length(config: DecoderConfig, length: int) -> None:
    """Raise `UserError` where there are fewer learned positions than a row is long."""
    check(config.positions != "learned" or length <= config.max_length, "sequence length", length,
          f"at most model.max_length = {config.max_length}, the number of learned positions",
          "Shorten the sequence (data.length) or raise model.max_length.")  # fmt: skip
