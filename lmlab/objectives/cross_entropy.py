"""Softmax cross-entropy against integer labels without ever holding [B, T, V] logits, forward or backward."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lmlab.core.sharding import sum_over_tokens
from lmlab.core.types import Array, Params

Logits = Callable[[Params, Array], Array]


class TokenSums(NamedTuple):
    """Weighted sums over tokens, [] float32 each."""

    loss: Array
    """sum w (-log p(label) + z_loss * log(Z)^2). The only one that has a gradient, and none to the weights."""
    nll: Array
    """sum w (-log p(label)), in nats."""
    correct: Array
    """sum w [no logit is above the label's]."""


@partial(jax.custom_vjp, nondiff_argnums=(0, 5, 6, 7))
def chunked_cross_entropy(
    logits: Logits, head: Params, hidden_BTD: Array, labels_BT: Array, weights_BT: Array,
    z_loss: float, chunk: int, axes: Any = None,
) -> TokenSums:  # fmt: skip
    """Cross-entropy of `logits(head, hidden)`, `chunk` places of every row at a time.

    One chunk of logits [B, chunk, V] is alive at any moment. The gradient is formed in the forward pass
    from the same chunk: (softmax * (1 + 2 z log Z) - onehot) w, pulled back through `logits`. So nothing is
    computed twice, and what waits for the backward pass is the gradient of hidden and head (float32 for the
    head). Labels of weight 0 may hold any number. z-loss: arXiv 2204.02311, section 5. On a mesh every device goes
    through the chunks of its own tokens, and the sums and the head's gradient are added up once, at the end; `axes`,
    the logical axes of the head (`lm.head(lm.axes)`), tell which part of that gradient a device keeps.
    """

    def sums_of(head: Params, hidden_BTD: Array, labels_BT: Array, weights_BT: Array) -> TokenSums:
        zeros = TokenSums(*(jnp.zeros((), wide(hidden_BTD.dtype)),) * 3)

        def body(sums: TokenSums, part: tuple[Array, Array, Array]) -> tuple[TokenSums, None]:
            hidden, labels, weights = part
            return jax.tree.map(jnp.add, sums, _chunk_sums(logits(head, hidden), z_loss, labels, weights)[0]), None

        parts = chunks(hidden_BTD, labels_BT, weights_BT.astype(zeros.loss.dtype), chunk=chunk)
        return jax.lax.scan(body, zeros, parts)[0]

    return sum_over_tokens(sums_of)(head, hidden_BTD, labels_BT, weights_BT)


def chunks(*arrays_BT: Array, chunk: int) -> Any:
    """A tuple of the arrays with their time axis cut into chunks that come first; zeros fill up the last."""
    length = arrays_BT[0].shape[1]
    chunk = min(chunk, length)
    count = -(-length // chunk)

    def cut(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, count * chunk - length)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], count, chunk, *x.shape[2:]), 1, 0)

    return tuple(map(cut, arrays_BT))


def wide(dtype: jnp.dtype) -> jnp.dtype:
    """The type that is added up in: float32, or float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)


def _chunk_sums(
    logits_BCV: Array, z_loss: float, labels_BC: Array, weights_BC: Array
) -> tuple[TokenSums, tuple[Array, ...]]:
    """Sums over one chunk, and what its gradient is made of."""
    logits_BCV = logits_BCV.astype(weights_BC.dtype)
    top_BC1 = jnp.max(logits_BCV, axis=-1, keepdims=True)
    exp_BCV = jnp.exp(logits_BCV - top_BC1)
    total_BC1 = jnp.sum(exp_BCV, axis=-1, keepdims=True)
    log_z_BC = (jnp.log(total_BC1) + top_BC1)[..., 0]
    # Not a gather: XLA cannot always divide one over the vocabulary.
    label_BCV = jax.lax.broadcasted_iota(jnp.int32, logits_BCV.shape, 2) == labels_BC[..., None]
    label_logit_BC = jnp.sum(jnp.where(label_BCV, logits_BCV, 0), axis=-1)
    nll_BC = jnp.where(weights_BC != 0, log_z_BC - label_logit_BC, 0)
    z_BC = jnp.where(weights_BC != 0, jnp.square(log_z_BC), 0)
    sums = TokenSums(
        loss=jnp.sum(weights_BC * (nll_BC + z_loss * z_BC)),
        nll=jnp.sum(weights_BC * nll_BC),
        correct=jnp.sum(weights_BC * (label_logit_BC >= top_BC1[..., 0])),
    )
    return sums, (exp_BCV, total_BC1, log_z_BC, label_BCV)


def _forward(
    logits: Logits, head: Params, hidden_BTD: Array, labels_BT: Array, weights_BT: Array,
    z_loss: float, chunk: int, axes: Any = None,
) -> tuple[TokenSums, tuple[Array, Params]]:  # fmt: skip
    def body(
        carry: tuple[TokenSums, Params], part: tuple[Array, Array, Array], head: Params
    ) -> tuple[tuple[TokenSums, Params], Array]:
        sums, head_grad = carry
        hidden, labels, weights = part
        out, pullback = jax.vjp(logits, head, hidden)
        new, (exp, total, log_z, is_label) = _chunk_sums(out, z_loss, labels, weights)
        slope = weights[..., None] * (exp * ((1 + 2 * z_loss * log_z)[..., None] / total) - is_label)
        slope = jnp.where(weights[..., None] != 0, slope, 0)
        head_slope, hidden_slope = pullback(slope.astype(out.dtype))
        head_grad = jax.tree.map(lambda a, b: a + b.astype(a.dtype), head_grad, head_slope)
        return (jax.tree.map(jnp.add, sums, new), head_grad), hidden_slope

    def pass_over(
        head: Params, hidden_BTD: Array, labels_BT: Array, weights_BT: Array
    ) -> tuple[tuple[TokenSums, Params], Array]:
        zeros = TokenSums(*(jnp.zeros((), wide(hidden_BTD.dtype)),) * 3)
        start = (zeros, jax.tree.map(lambda x: jnp.zeros(x.shape, wide(x.dtype)), head))
        parts = chunks(hidden_BTD, labels_BT, weights_BT.astype(zeros.loss.dtype), chunk=chunk)
        summed, slopes = jax.lax.scan(partial(body, head=head), start, parts)
        batch, length, width = hidden_BTD.shape
        return summed, jnp.moveaxis(slopes, 0, 1).reshape(batch, -1, width)[:, :length]

    names = None if axes is None else (TokenSums((), (), ()), axes)  # type: ignore[arg-type]
    over_tokens = sum_over_tokens(pass_over, own=True, names=names)
    (sums, head_grad), hidden_grad = over_tokens(head, hidden_BTD, labels_BT, weights_BT)
    # Scalars that remember the types the gradients must come back in.
    return sums, (hidden_grad, jax.tree.map(lambda g, x: (g, jnp.zeros((), x.dtype)), head_grad, head))


def _backward(
    logits: Logits, z_loss: float, chunk: int, axes: Any, residuals: tuple[Array, Params], cotangent: TokenSums
) -> tuple[Params, Array, None, None]:
    del logits, z_loss, chunk, axes
    return *scaled(residuals, cotangent.loss), None, None


def scaled(residuals: tuple[Array, Params], factor: Array) -> tuple[Params, Array]:
    """Gradients of head and hidden states that a forward pass has formed, times what the loss counts.

    residuals: of the hidden states; and of the head, each with a scalar of the type that it is to come back in.
    """
    hidden_grad, head_grad = residuals
    is_pair = lambda x: isinstance(x, tuple)
    head = jax.tree.map(lambda pair: (factor * pair[0]).astype(pair[1].dtype), head_grad, is_leaf=is_pair)
    return head, (factor * hidden_grad).astype(hidden_grad.dtype)


chunked_cross_entropy.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(0, 5, 6, 7))
def heads_cross_entropy(
    logits: Logits, head: Params, hidden_BMTD: Array, labels_BMT: Array, weights_BMT: Array,
    z_loss: float, chunk: int, axes: Any = None,
) -> TokenSums:  # fmt: skip
    """Cross-entropy of M predictions of each place under one unembedding, [M] each; arguments as above.

    One chunk of one head's logits is alive at any moment. What factor each head's sum will have is known only in the
    backward pass, so logits are computed twice there and back rather than that a gradient of the unembedding waits for
    each head: memory does not grow with M V (arXiv 2404.19737, section 2, has the heads' gradients in turns to the same
    end). The unembedding's gradient is added up over all heads, in float32.
    """

    def one(number: Array) -> TokenSums:
        part = (jax.lax.dynamic_index_in_dim(x, number, 1, False) for x in (hidden_BMTD, labels_BMT, weights_BMT))
        return chunked_cross_entropy(logits, head, *part, z_loss, chunk, axes)

    return jax.lax.map(one, jnp.arange(hidden_BMTD.shape[1]))


def _heads_forward(
    logits: Logits, head: Params, hidden_BMTD: Array, labels_BMT: Array, weights_BMT: Array,
    z_loss: float, chunk: int, axes: Any = None,
) -> tuple[TokenSums, tuple[Any, ...]]:  # fmt: skip
    arrays = head, hidden_BMTD, labels_BMT, weights_BMT
    return heads_cross_entropy(logits, *arrays, z_loss, chunk, axes), arrays


def _heads_backward(
    logits: Logits, z_loss: float, chunk: int, axes: Any, residuals: tuple[Any, ...], cotangent: TokenSums
) -> tuple[Params, Array, None, None]:
    head, hidden_BMTD, labels_BMT, weights_BMT = residuals
    # The gradient is linear in the weights. Heads become rows, which stay on their devices, of shorter chunks.
    rows = lambda x: x.reshape(-1, *x.shape[2:])
    weights = rows(weights_BMT * cotangent.loss[None, :, None])
    shorter = -(-chunk // weights_BMT.shape[1])
    _, slopes = _forward(logits, head, rows(hidden_BMTD), rows(labels_BMT), weights, z_loss, shorter, axes)
    one = TokenSums(*(jnp.ones((), jnp.float32),) * 3)
    head_slope, hidden_slope, *_ = _backward(logits, z_loss, shorter, axes, slopes, one)
    return head_slope, hidden_slope.reshape(hidden_BMTD.shape), None, None


heads_cross_entropy.defvjp(_heads_forward, _heads_backward)
