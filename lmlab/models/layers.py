"""Norms, feed-forward and self-attention as linen modules. Kernels are stored unfused where they are separate
matrices of the paper, along a `stack` axis where they share an input, so that one matmul computes them.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from lmlab.core.masking import AttentionMask
from lmlab.core.types import Array
from lmlab.models.attention import attention
from lmlab.models.cache import KVCache, read, write
from lmlab.models.config import DecoderConfig, TransformerConfig
from lmlab.models.projection import project
from lmlab.models.rotary import rotate, stand_still

INIT_STD = 0.02
"""GPT-2's standard deviation; projections into the residual stream are divided by sqrt(2 L)."""

PROJECTION = "projection"
"""What results of products with weights are called where rematerialisation chooses what to keep."""


def kernel_init(names: tuple[str, ...], std: float = INIT_STD) -> nn.initializers.Initializer:
    """Normal initialiser that tells the logical names of the axes."""
    return named(nn.initializers.normal(std), names)


def named(init: nn.initializers.Initializer, names: tuple[str, ...]) -> Any:
    """The initialiser with the logical names of the axes; modules see the plain array."""
    return nn.with_logical_partitioning(init, names)


def standardise(x: Array, kind: str, eps: float) -> Array:
    """X over its root mean square along the last axis, in float32; `layer`: after its mean is taken off."""
    y = x.astype(jnp.float32)
    if kind == "layer":
        y = y - jnp.mean(y, axis=-1, keepdims=True)
    return y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last axis, computed in float32, returned in the type of the input."""

    kind: str
    eps: float
    axis: str = "norm"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Normalise the last axis of x."""
        size = x.shape[-1]
        scale = self.param("scale", named(nn.initializers.ones, (self.axis,)), (size,))
        y = standardise(x, self.kind, self.eps)
        # Parameters in bfloat16 are widened before they are broadcast: their gradient is a sum over all tokens.
        y = y * jnp.broadcast_to(scale.astype(jnp.float32), y.shape)
        if self.kind == "layer":
            bias = self.param("bias", named(nn.initializers.zeros, (self.axis,)), (size,))
            y = y + jnp.broadcast_to(bias.astype(jnp.float32), y.shape)
        return y.astype(x.dtype)


class Linear(nn.Module):
    """Contract the last `len(inputs)` axes of x with a kernel of the named axes.

    `inputs` and `outputs` map logical axis names to sizes, in order. Names of `outputs` called `stack` say
    that the kernel is a stack of matrices side by side.
    """

    inputs: dict[str, int]
    outputs: dict[str, int]
    bias: bool = False
    std: float = INIT_STD

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """X [..., *inputs] -> [..., *outputs], in the type of x."""
        ins, outs = tuple(self.inputs.values()), tuple(self.outputs.values())
        names = (*self.inputs, *self.outputs)
        kernel = self.param("kernel", kernel_init(names, self.std), (*ins, *outs))
        y = checkpoint_name(project(x, kernel, names, len(ins)), PROJECTION)
        if self.bias:
            bias = self.param("bias", named(nn.initializers.zeros, tuple(self.outputs)), outs)
            y = (y + jnp.broadcast_to(bias.astype(jnp.float32), y.shape)).astype(x.dtype)
        return y


def unstack(x_BT2x: Array) -> tuple[Array, Array]:
    """The two parts of [B, T, 2, ...]. Split, not indexed: the gradient of an index is padding and a sum."""
    first, second = jnp.split(x_BT2x, 2, axis=2)
    return first[:, :, 0], second[:, :, 0]


def attend(
    config: DecoderConfig, q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, table: tuple[Array, Array] | None,
    mask: AttentionMask, cache: KVCache | None, layer: int | Array, places_BT: Array | None,
) -> tuple[Array, KVCache | None]:  # fmt: skip
    """Attention [B, T, N, H] of projected heads, rotated; with a cache, keys and values are written to it and all of it
    is seen.
    """
    if table is not None:
        if config.rotary.skipped_layers:
            table = stand_still(table, jnp.any(layer == jnp.asarray(config.rotary.skipped_layers)))
        q_BTNH = rotate(q_BTNH, table, config.rotary.pairs)
        k_BTKH = rotate(k_BTKH, table, config.rotary.pairs)
    if cache is not None and places_BT is not None:
        cache = write(cache, layer, places_BT, k_BTKH, v_BTKH)
        k_BTKH, v_BTKH = (part_BSKH.astype(q_BTNH.dtype) for part_BSKH in read(cache, layer))
    return attention(q_BTNH, k_BTKH, v_BTKH, mask, config.execution.attention), cache


class SelfAttention(nn.Module):
    """Grouped-query attention; with a cache, new keys and values are written to it and all of it is seen."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self, x_BTD: Array, table: tuple[Array, Array] | None, mask: AttentionMask,
        cache: KVCache | None, layer: int | Array, places_BT: Array | None,
    ) -> tuple[Array, KVCache | None]:  # fmt: skip
        """[B, T, D] -> [B, T, D]."""
        config, shape = self.config, self.config.attention
        size = config.head_dim
        q_BTNH = Linear(
            {"embed": config.width}, {"heads": shape.heads, "head_dim": size}, shape.qkv_bias, name="query"
        )(x_BTD)
        kv = {"stack": 2, "kv_heads": config.kv_heads, "head_dim": size}
        kv_BT2KH = Linear({"embed": config.width}, kv, shape.qkv_bias, name="key_value")(x_BTD)
        k_BTKH, v_BTKH = unstack(kv_BT2KH)
        if shape.qk_norm:
            q_BTNH = Norm("rms", config.norm_eps, "head_dim", name="query_norm")(q_BTNH)
            k_BTKH = Norm("rms", config.norm_eps, "head_dim", name="key_norm")(k_BTKH)
        out_BTNH, cache = attend(config, q_BTNH, k_BTKH, v_BTKH, table, mask, cache, layer, places_BT)
        std = INIT_STD / (2 * config.layers) ** 0.5
        out = Linear({"heads": shape.heads, "head_dim": size}, {"embed": config.width}, shape.out_bias, std, name="out")
        return out(out_BTNH), cache


class MLP(nn.Module):
    """SwiGLU or GELU feed-forward."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x_BTD: Array) -> Array:
        """[B, T, D] -> [B, T, D]."""
        config, mlp = self.config, self.config.mlp
        ffn, embed = {"ffn": config.mlp_width}, {"embed": config.width}
        if mlp.activation == "swiglu":
            both_BT2F = Linear(embed, {"stack": 2, **ffn}, mlp.bias, name="gate_up")(x_BTD)
            gate_BTF, up_BTF = unstack(both_BT2F)
            hidden_BTF = nn.silu(gate_BTF) * up_BTF
        else:
            up_BTF = Linear(embed, ffn, mlp.bias, name="up")(x_BTD)
            hidden_BTF = nn.gelu(up_BTF, approximate=mlp.activation == "gelu_tanh")
        return Linear(ffn, embed, mlp.bias, INIT_STD / (2 * config.layers) ** 0.5, name="down")(hidden_BTF)
