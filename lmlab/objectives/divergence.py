"""Divergences of a student's predictions from a teacher's, without ever holding [B, T, V] logits of either."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from lmlab.core.sharding import sum_over_tokens
from lmlab.core.types import Array, Params, TopK
from lmlab.objectives.cross_entropy import Logits, chunks, scaled, wide

Divergence: TypeAlias = Callable[[Array, Array], Array]
"""`divergence(logq, logp)`: of the student's p from the teacher's q, [...]; log-probabilities [..., K] that add up."""

LEAST_TAIL = 1e-9
"""Probability that the tail has at least, of teacher and student: its logarithm is needed."""


def forward_kl(logq: Array, logp: Array) -> Array:
    """KL(q || p), in nats: the student must cover all that the teacher would say."""
    return _mean(logq, logq - logp)


def reverse_kl(logq: Array, logp: Array) -> Array:
    """KL(p || q), in nats: the student must say nothing that the teacher would not (MiniLLM, arXiv 2306.08543)."""
    return _mean(logp, logp - logq)


def jensen_shannon(b: float) -> Divergence:
    """B KL(q || m) + (1 - b) KL(p || m) with m = b q + (1 - b) p, 0 < b < 1 (GKD, arXiv 2306.13649, equation 1).

    Divided by b it tends to the forward KL for b -> 0, divided by 1 - b to the reverse one for b -> 1.
    """
    if not 0 < b < 1:
        raise ValueError(f"b = {b}: forward_kl and reverse_kl are the limits at 0 and 1")

    def divergence(logq: Array, logp: Array) -> Array:
        logm = jnp.logaddexp(_finite(logq) + jnp.log(b), _finite(logp) + jnp.log1p(-b))
        return b * _mean(logq, logq - logm) + (1 - b) * _mean(logp, logp - logm)

    return divergence


def _mean(logp: Array, values: Array) -> Array:
    """Of the values under p; where p is 0 they may be anything, and have no gradient."""
    said = logp > -jnp.inf
    return jnp.sum(jnp.exp(logp) * jnp.where(said, values, 0), axis=-1)


def _finite(logp: Array) -> Array:
    """With a very small number for minus infinity: sums of nothing but that have no gradient."""
    return jnp.maximum(logp, jnp.finfo(logp.dtype).min / 2)


class Compared(NamedTuple):
    """What both say of the next token."""

    logq: Array
    """[B, C, K] the teacher, over tokens or buckets of them."""
    logp: Array
    """[B, C, K] the student, over the same."""
    best: Array
    """[B, C] int32, the teacher's most probable token."""


Compare: TypeAlias = Callable[[Any, Any, Array], Compared]
"""`compare(shared, target, logits_BCV)`: the student's logits against a chunk of what is known of the teacher.
target: arrays [B, C, ...]. shared: parameters of the teacher that all chunks need."""


def against_logits(logits: Logits, temperature: float = 1.0) -> Compare:
    """Against hidden states of a teacher, whose unembedding is shared; temperature divides the logits of both."""

    def compare(head: Params, hidden_BCD: Array, logits_BCV: Array) -> Compared:
        taught_BCV = logits(head, hidden_BCD).astype(wide(hidden_BCD.dtype))
        soften = lambda x: jax.nn.log_softmax(x / temperature)
        return Compared(soften(taught_BCV), soften(logits_BCV), jnp.argmax(taught_BCV, axis=-1))

    return compare


def against_top_k(temperature: float = 1.0) -> Compare:
    """Against stored log-probabilities: k tokens, and one bucket for all others.

    Merging tokens makes no divergence larger (data processing), so this is a lower bound of what all tokens give, and
    equal to it at k = V. temperature: at which they were stored; the student's logits are divided by it.
    """

    def compare(shared: tuple[()], stored: TopK, logits_BCV: Array) -> Compared:
        del shared
        logq = jax.nn.log_softmax(stored.logprobs_BAK.astype(logits_BCV.dtype))
        return Compared(logq, merged(logits_BCV / temperature, stored.ids_BAK), stored.ids_BAK[..., 0])

    return compare


def merged(logits: Array, ids: Array) -> Array:
    """Log-probabilities [..., k + 1] of the tokens `ids` [..., k], all different, and of all others together."""
    logp = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(logp, ids, axis=-1)
    # Not 1 - sum: of a small tail that would leave rounding errors.
    rest = jnp.put_along_axis(_finite(logp), ids, jnp.finfo(logp.dtype).min / 2, axis=-1, inplace=False)
    tail = jax.nn.logsumexp(rest, axis=-1, keepdims=True)
    return jnp.concatenate([chosen, jnp.maximum(tail, jnp.log(LEAST_TAIL))], axis=-1)


def top_k(logits: Array, k: int) -> TopK:
    """The k most probable tokens, best first, and the probability of all others together; float32."""
    ids = jax.lax.top_k(logits, k)[1]
    return TopK(merged(logits.astype(wide(logits.dtype)), ids), ids)


class DivergenceSums(NamedTuple):
    """Weighted sums over tokens, [] float32 each."""

    loss: Array
    """sum w temperature^2 D(q, p). The only one that has a gradient, and it to the student alone."""
    agreement: Array
    """sum w [both find the same token most probable]."""
    entropy: Array
    """sum w (entropy of what the teacher says, in nats, over what is compared)."""
    nll: Array
    """sum w (-log p(label)) of the student, at temperature 1."""


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3, 4, 5))
def chunked_divergence(
    compare: Compare, divergence: Divergence, temperature: float, logits: Logits, chunk: int, axes: Any,
    shared: tuple[Params, Any], hidden_BAD: Array, target: Any, labels_BA: Array, weights_BA: Array,
) -> DivergenceSums:  # fmt: skip
    """Divergence of `logits(head, hidden)` from a teacher, `chunk` places of every row at a time.

    One chunk of each side's logits [B, chunk, V] is alive at any moment, and the student's gradient is formed from it
    in the forward pass, as in `chunked_cross_entropy`; of the forward KL at temperature 1 it is p - q at every place.
    shared: the student's head and what `compare` shares. target: arrays [B, A, ...] for `compare`. axes: logical axes
    of the student's head. Labels and targets of weight 0 may be anything.
    """

    def sums_of(shared: tuple[Params, Any], *arrays: Array) -> DivergenceSums:
        head, taught = shared

        def body(sums: DivergenceSums, part: tuple[Array, ...]) -> tuple[DivergenceSums, None]:
            new = _chunk_sums(compare, divergence, temperature, taught, tree, logits(head, part[0]), part[1:])
            return jax.tree.map(jnp.add, sums, new), None

        return jax.lax.scan(body, _zeros(arrays[2]), chunks(*arrays, chunk=chunk))[0]

    leaves, tree = jax.tree.flatten(target)
    return sum_over_tokens(sums_of)(shared, hidden_BAD, labels_BA, _widened(hidden_BAD, weights_BA), *leaves)


def _zeros(weights_BA: Array) -> DivergenceSums:
    return DivergenceSums(*(jnp.zeros((), weights_BA.dtype),) * 4)


def _widened(hidden_BAD: Array, weights_BA: Array) -> Array:
    return weights_BA.astype(wide(hidden_BAD.dtype))


def _chunk_sums(
    compare: Compare, divergence: Divergence, temperature: float, taught: Any, tree: Any, logits_BCV: Array,
    part: tuple[Array, ...],
) -> DivergenceSums:  # fmt: skip
    """Sums over one chunk, to be differentiated by the logits."""
    labels_BC, weights_BC, *leaves = part
    logits_BCV = logits_BCV.astype(weights_BC.dtype)
    logq, logp, best_BC = compare(taught, jax.tree.unflatten(tree, leaves), logits_BCV)
    total = lambda x_BC: jnp.sum(jnp.where(weights_BC != 0, weights_BC * x_BC, 0))
    # Not a gather: XLA cannot always divide one over the vocabulary.
    label_BCV = jax.lax.broadcasted_iota(jnp.int32, logits_BCV.shape, 2) == labels_BC[..., None]
    label_BC = jnp.sum(jnp.where(label_BCV, logits_BCV, 0), axis=-1)
    return DivergenceSums(
        loss=temperature**2 * total(divergence(jax.lax.stop_gradient(logq), logp)),
        agreement=total(best_BC == jnp.argmax(logits_BCV, axis=-1)),
        entropy=total(-_mean(logq, logq)),
        nll=total(jax.nn.logsumexp(logits_BCV, axis=-1) - label_BC),
    )


def _forward(
    compare: Compare, divergence: Divergence, temperature: float, logits: Logits, chunk: int, axes: Any,
    shared: tuple[Params, Any], hidden_BAD: Array, target: Any, labels_BA: Array, weights_BA: Array,
) -> tuple[DivergenceSums, tuple[Array, Params]]:  # fmt: skip
    def pass_over(shared: tuple[Params, Any], *arrays: Array) -> tuple[tuple[DivergenceSums, Params], Array]:
        head, taught = shared

        def body(
            carry: tuple[DivergenceSums, Params], part: tuple[Array, ...]
        ) -> tuple[tuple[DivergenceSums, Params], Array]:
            sums, head_grad = carry
            hidden, *rest = part
            out, pullback = jax.vjp(logits, head, hidden)

            def loss(out: Array) -> tuple[Array, DivergenceSums]:
                new = _chunk_sums(compare, divergence, temperature, taught, tree, out, tuple(rest))
                return new.loss, new

            slope, new = jax.grad(loss, has_aux=True)(out)
            head_slope, hidden_slope = pullback(jnp.where(rest[1][..., None] != 0, slope, 0))
            head_grad = jax.tree.map(lambda a, b: a + b.astype(a.dtype), head_grad, head_slope)
            return (jax.tree.map(jnp.add, sums, new), head_grad), hidden_slope

        start = (_zeros(arrays[2]), jax.tree.map(lambda x: jnp.zeros(x.shape, wide(x.dtype)), head))
        summed, slopes = jax.lax.scan(body, start, chunks(*arrays, chunk=chunk))
        batch, length, width = arrays[0].shape
        return summed, jnp.moveaxis(slopes, 0, 1).reshape(batch, -1, width)[:, :length]

    leaves, tree = jax.tree.flatten(target)
    names = None if axes is None else (DivergenceSums((), (), (), ()), axes)  # type: ignore[arg-type]
    arrays = hidden_BAD, labels_BA, _widened(hidden_BAD, weights_BA), *leaves
    (sums, head_grad), hidden_grad = sum_over_tokens(pass_over, own=True, names=names)(shared, *arrays)
    # Scalars that remember the types the gradients must come back in.
    return sums, (hidden_grad, jax.tree.map(lambda g, x: (g, jnp.zeros((), x.dtype)), head_grad, shared[0]))


def _backward(
    compare: Compare, divergence: Divergence, temperature: float, logits: Logits, chunk: int, axes: Any,
    residuals: tuple[Array, Params], cotangent: DivergenceSums,
) -> tuple[tuple[Params, None], Array, None, None, None]:  # fmt: skip
    del compare, divergence, temperature, logits, chunk, axes
    head, hidden = scaled(residuals, cotangent.loss)
    return (head, None), hidden, None, None, None


chunked_divergence.defvjp(_forward, _backward)
