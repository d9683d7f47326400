"""Log-probabilities of given tokens, and of answers, without ever holding [B, T, V] logits, forward or backward."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from lmlab.core.masking import answers_mask
from lmlab.core.sharding import sum_over_tokens
from lmlab.core.types import AnswerBatch, Array, Params
from lmlab.models.lm import LM
from lmlab.objectives.cross_entropy import Logits, chunks, wide


@partial(jax.custom_vjp, nondiff_argnums=(0, 4, 5))
def chunked_logprobs(
    logits: Logits, head: Params, hidden_BTD: Array, labels_BT: Array, chunk: int, axes: Any = None
) -> Array:  # fmt: skip
    """Log p(label) [B, T] float32 by `logits(head, hidden)`, `chunk` places of every row at a time.

    What factor each of them will have is known in the backward pass alone, so the logits of a chunk are computed again
    there: (onehot - softmax) times the factor, pulled back through `logits`. One chunk of logits [B, chunk, V] is alive
    at any moment. Labels whose factor is 0 may hold any number. axes: see `chunked_cross_entropy`.
    """

    def of_chunks(head: Params, hidden_BTD: Array, labels_BT: Array) -> tuple[tuple[()], Array]:
        def body(_: None, part: tuple[Array, Array]) -> tuple[None, Array]:
            return None, _label_logprobs(logits(head, part[0]), part[1])[0]

        found = jax.lax.scan(body, None, chunks(hidden_BTD, labels_BT, chunk=chunk))[1]
        return (), _rows(found, hidden_BTD.shape[1])

    return sum_over_tokens(of_chunks, own=True)(head, hidden_BTD, labels_BT)[1]


def _label_logprobs(logits_BCV: Array, labels_BC: Array) -> tuple[Array, Array, Array]:
    """Log p(label) [B, C], log Z [B, C, 1] and where the labels are [B, C, V]."""
    logits_BCV = logits_BCV.astype(wide(logits_BCV.dtype))
    log_z_BC1 = jax.nn.logsumexp(logits_BCV, axis=-1, keepdims=True)
    # Not a gather: XLA cannot always divide one over the vocabulary.
    label_BCV = jax.lax.broadcasted_iota(jnp.int32, logits_BCV.shape, 2) == labels_BC[..., None]
    return jnp.sum(jnp.where(label_BCV, logits_BCV, 0), axis=-1) - log_z_BC1[..., 0], log_z_BC1, label_BCV


def _rows(x: Array, length: int) -> Array:
    """[chunks, B, C, ...] -> [B, T, ...]."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def _forward(
    logits: Logits, head: Params, hidden_BTD: Array, labels_BT: Array, chunk: int, axes: Any = None
) -> tuple[Array, tuple[Params, Array, Array]]:  # fmt: skip
    return chunked_logprobs(logits, head, hidden_BTD, labels_BT, chunk, axes), (head, hidden_BTD, labels_BT)


def _backward(
    logits: Logits, chunk: int, axes: Any, residuals: tuple[Params, Array, Array], cotangent_BT: Array
) -> tuple[Params, Array, None]:  # fmt: skip
    def pass_over(head: Params, hidden_BTD: Array, labels_BT: Array, factors_BT: Array) -> tuple[Params, Array]:
        def body(head_grad: Params, part: tuple[Array, Array, Array]) -> tuple[Params, Array]:
            hidden, labels, factors = part
            out, pullback = jax.vjp(logits, head, hidden)
            _, log_z, is_label = _label_logprobs(out, labels)
            slope = factors[..., None] * (is_label - jnp.exp(out.astype(log_z.dtype) - log_z))
            slope = jnp.where(factors[..., None] != 0, slope, 0)
            head_slope, hidden_slope = pullback(slope.astype(out.dtype))
            return jax.tree.map(lambda a, b: a + b.astype(a.dtype), head_grad, head_slope), hidden_slope

        start = jax.tree.map(lambda x: jnp.zeros(x.shape, wide(x.dtype)), head)
        head_grad, slopes = jax.lax.scan(body, start, chunks(hidden_BTD, labels_BT, factors_BT, chunk=chunk))
        return head_grad, _rows(slopes, hidden_BTD.shape[1])

    head = residuals[0]
    head_grad, hidden_grad = sum_over_tokens(pass_over, own=True, names=axes)(*residuals, cotangent_BT)
    return jax.tree.map(lambda g, x: g.astype(x.dtype), head_grad, head), hidden_grad, None


chunked_logprobs.defvjp(_forward, _backward)


def read_answers(lm: LM, params: Params, batch: AnswerBatch) -> Array:
    """Hidden states [B, T, D] of rows with answers."""
    mask = answers_mask(batch, lm.config.attention.window)
    return lm.apply(
        params, batch.tokens_BT, positions_BT=batch.positions_BT, segments_BT=batch.segments_BT, mask=mask
    )[0]  # fmt: skip


def answer_logprobs(lm: LM, params: Params, batch: AnswerBatch, chunk: int = 64) -> Array:
    """Log-probability [B, A] float32 of every token of the answers, 0 where there is none.

    The unembedding is applied at places that predict an answer's token and nowhere else. chunk: places of a row whose
    logits are held at once.
    """
    hidden_BTD = read_answers(lm, params, batch)
    hidden_BAD = jnp.take_along_axis(hidden_BTD, batch.places_BA[..., None], axis=1)
    logprobs_BA = chunked_logprobs(
        lm.logits, lm.head(params), hidden_BAD, batch.labels_BA, chunk, lm.head(lm.axes)
    )  # fmt: skip
    return jnp.where(batch.answers_BA != 0, logprobs_BA, 0)


def sum_by_answer(values_BA: Array, batch: AnswerBatch) -> Array:
    """The sum [B, S] of values of tokens over each answer."""
    return jnp.sum(jnp.where(members(batch), values_BA[..., None], 0), axis=1)


def members(batch: AnswerBatch) -> Array:
    """Which token belongs to which answer, bool [B, A, S]."""
    return batch.answers_BA[..., None] == jnp.arange(1, batch.ends_BS.shape[1] + 1)[None, None]


def answer_lengths(batch: AnswerBatch) -> Array:
    """The number of tokens [B, S] of each answer, float32."""
    return sum_by_answer(jnp.ones(batch.answers_BA.shape, jnp.float32), batch)
