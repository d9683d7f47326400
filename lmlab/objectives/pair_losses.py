"""Losses of pairs of answers: DPO and its family, as functions of log-probabilities under policy and reference.

DPO (arXiv 2305.18290, sections 4 and 5): the policy that maximises E[r(x, y)] - beta KL(policy || reference) is
reference * exp(r / beta) / Z(x), so r = beta log(policy / reference) + beta log Z(x). In a pair of answers to one
prompt Z cancels, and the Bradley-Terry probability that w is preferred to l is sigmoid(beta (h_w - h_l)) with the
log-ratios h = log policy - log reference. Its negative logarithm is the loss, and beta h the implicit reward.

Every loss is `loss(scores, beta) -> losses`, one a pair; further options are bound by `partial`. What changes the
scores comes before it: `after(per_token, ipo)`.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from lmlab.core.types import Array

LARGEST_EXPONENT = 80.0
"""Exponents are cut here: exp of more is no float32."""

log_sigmoid = jax.nn.log_sigmoid


class PairScores(NamedTuple):
    """Log-probabilities of the answers of pairs, in nats, float32, all of one shape."""

    chosen: Array
    """Log p(preferred answer | prompt) under the policy, the sum over its tokens."""
    rejected: Array
    chosen_reference: Array
    """The same under the reference."""
    rejected_reference: Array
    chosen_length: Array
    """Number of tokens."""
    rejected_length: Array

    @property
    def chosen_ratio(self) -> Array:
        """h_w, the log-ratio of policy and reference."""
        return self.chosen - self.chosen_reference

    @property
    def rejected_ratio(self) -> Array:
        """h_l."""
        return self.rejected - self.rejected_reference

    @property
    def delta(self) -> Array:
        """h_w - h_l."""
        return self.chosen_ratio - self.rejected_ratio


PairLoss: TypeAlias = Callable[[PairScores, float], Array]
"""`loss(scores, beta) -> losses`, in the shape of the scores; differentiable in those of the policy."""


def after(change: Callable[[PairScores], PairScores], loss: PairLoss) -> PairLoss:
    """The loss of changed scores; `after(per_token, sigmoid)` is length-normalised DPO."""
    return lambda scores, beta: loss(change(scores), beta)


def per_token(scores: PairScores) -> PairScores:
    """Means over tokens in place of sums: length-normalised losses, and IPO as its authors and TRL compute it."""
    chosen, rejected = jnp.maximum(scores.chosen_length, 1), jnp.maximum(scores.rejected_length, 1)
    return scores._replace(
        chosen=scores.chosen / chosen, chosen_reference=scores.chosen_reference / chosen,
        rejected=scores.rejected / rejected, rejected_reference=scores.rejected_reference / rejected,
    )  # fmt: skip


def without_reference(scores: PairScores) -> PairScores:
    """A reference under which all answers are equally probable."""
    return scores._replace(
        chosen_reference=jnp.zeros_like(scores.chosen), rejected_reference=jnp.zeros_like(scores.rejected)
    )


def diverging(slope: Callable[[Array], Array], scores: PairScores) -> PairScores:
    """Scores under which a loss keeps to the reference by another f-divergence (arXiv 2309.16240, section 4).

    slope: f'(policy / reference) as a function of the log-ratio: `forward_kl`, `jensen_shannon`, `alpha_divergence`; of
    the reverse KL, DPO's own, it is the log-ratio itself.
    """
    made = without_reference(scores)
    return made._replace(chosen=slope(scores.chosen_ratio), rejected=slope(scores.rejected_ratio))


def forward_kl(ratio: Array) -> Array:
    """1 - 1 / u at u = exp(ratio)."""
    return 1 - jnp.exp(jnp.minimum(-ratio, LARGEST_EXPONENT))


def jensen_shannon(ratio: Array) -> Array:
    """log(2 u / (u + 1)) at u = exp(ratio)."""
    return jnp.log(2.0) + log_sigmoid(ratio)


def alpha_divergence(ratio: Array, alpha: float) -> Array:
    """(u^(alpha - 1) - 1) / (alpha - 1) at u = exp(ratio), alpha not 1."""
    return (jnp.exp(jnp.minimum((alpha - 1) * ratio, LARGEST_EXPONENT)) - 1) / (alpha - 1)


def sigmoid(scores: PairScores, beta: float, smoothing: float = 0.0) -> Array:
    """DPO (arXiv 2305.18290, equation 7). smoothing: conservative DPO, the probability that a label is wrong."""
    z = beta * scores.delta
    return -(1 - smoothing) * log_sigmoid(z) - smoothing * log_sigmoid(-z)


def robust(scores: PairScores, beta: float, flips: float = 0.1) -> Array:
    """DPO whose mean over labels flipped at a rate of `flips` < 1/2 is that of clean labels (arXiv 2403.00409)."""
    z = beta * scores.delta
    return (-(1 - flips) * log_sigmoid(z) + flips * log_sigmoid(-z)) / (1 - 2 * flips)


def ipo(scores: PairScores, beta: float) -> Array:
    """Identity preference optimisation (arXiv 2310.12036, equation 17); the usual form is of `per_token` scores."""
    return jnp.square(scores.delta - 1 / (2 * beta))


def hinge(scores: PairScores, beta: float) -> Array:
    """SLiC-HF (arXiv 2305.10425) on log-ratios."""
    return jax.nn.relu(1 - beta * scores.delta)


def exo_pair(scores: PairScores, beta: float, smoothing: float = 1e-3) -> Array:
    """Exact optimisation: KL from policy's preference to (1 - smoothing, smoothing) (arXiv 2402.00856, equation 16)."""
    z = beta * scores.delta
    chosen, rejected = log_sigmoid(z), log_sigmoid(-z)
    return jnp.exp(chosen) * (chosen - jnp.log1p(-smoothing)) + jnp.exp(rejected) * (rejected - jnp.log(smoothing))


def nca_pair(scores: PairScores, beta: float) -> Array:
    """Noise contrastive alignment with two answers (arXiv 2402.05369)."""
    chosen, rejected = beta * scores.chosen_ratio, beta * scores.rejected_ratio
    return -log_sigmoid(chosen) - 0.5 * log_sigmoid(-chosen) - 0.5 * log_sigmoid(-rejected)


def bco_pair(scores: PairScores, beta: float, shift: float = 0.0) -> Array:
    """Binary classifier optimisation (arXiv 2404.04656). shift: of rewards, their running mean in the paper."""
    return -log_sigmoid(beta * scores.chosen_ratio - shift) - log_sigmoid(-(beta * scores.rejected_ratio - shift))


def sppo_hard(scores: PairScores, beta: float) -> Array:
    """Self-play preference optimisation with probabilities of 1 and 0 (arXiv 2405.00675, equation 4.7)."""
    return jnp.square(scores.chosen_ratio - 0.5 / beta) + jnp.square(scores.rejected_ratio + 0.5 / beta)


def apo_zero(scores: PairScores, beta: float) -> Array:
    """Anchored: the preferred answer up and the other one down (arXiv 2408.06266, equation 7)."""
    return jax.nn.sigmoid(-beta * scores.chosen_ratio) + jax.nn.sigmoid(beta * scores.rejected_ratio)


def apo_down(scores: PairScores, beta: float) -> Array:
    """Anchored: both down, the other one further (arXiv 2408.06266, equation 8)."""
    return jax.nn.sigmoid(beta * scores.chosen_ratio) + jax.nn.sigmoid(-beta * scores.delta)


def aot(scores: PairScores, beta: float, smoothing: float = 0.0) -> Array:
    """Alignment by optimal transport (arXiv 2406.05882): DPO on log-ratios that are sorted over all pairs.

    Couples the pairs that are scored together: those of a microbatch. Pairs of weight 0 must not be among them.
    """
    policy, reference = scores.chosen - scores.rejected, scores.chosen_reference - scores.rejected_reference
    ordered = lambda x: jnp.sort(x, axis=None).reshape(x.shape)
    return sigmoid(_of_deltas(scores, ordered(policy) - ordered(reference)), beta, smoothing)


def aot_unpaired(scores: PairScores, beta: float, smoothing: float = 0.0) -> Array:
    """The same with the log-ratios of preferred and of other answers sorted each for themselves."""
    ordered = lambda x: jnp.sort(x, axis=None).reshape(x.shape)
    return sigmoid(_of_deltas(scores, ordered(scores.chosen_ratio) - ordered(scores.rejected_ratio)), beta, smoothing)


def _of_deltas(scores: PairScores, deltas: Array) -> PairScores:
    zeros = jnp.zeros_like(deltas)
    return scores._replace(chosen=deltas, rejected=zeros, chosen_reference=zeros, rejected_reference=zeros)


def discopop(scores: PairScores, beta: float, tau: float = 0.05) -> Array:
    """The loss that DiscoPOP found: logistic and exponential, mixed by the log-ratio (arXiv 2406.08414, equation 5)."""
    z = beta * scores.delta
    mix = jax.nn.sigmoid(z / tau)
    # Where exp would be cut its weight is 0 in float32: the cut is never seen.
    return -(1 - mix) * log_sigmoid(z) + mix * jnp.exp(jnp.minimum(-z, LARGEST_EXPONENT))


def simpo(scores: PairScores, beta: float, gamma: float = 1.0) -> Array:
    """Mean log-probabilities with a margin, no reference; beta 2 to 2.5 (arXiv 2405.14734, equation 6)."""
    return -log_sigmoid(beta * without_reference(per_token(scores)).delta - gamma)


def cpo(scores: PairScores, beta: float) -> Array:
    """Contrastive preference optimisation, no reference (arXiv 2401.08417, equation 4); goes with `sft`."""
    return sigmoid(without_reference(scores), beta)


def orpo(scores: PairScores, beta: float) -> Array:
    """Beta times the log-odds ratio, no reference (arXiv 2403.07691, equation 7); goes with `sft = 1`."""
    means = per_token(scores)
    return -beta * log_sigmoid(_log_odds(means.chosen) - _log_odds(means.rejected))


def _log_odds(logprob: Array) -> Array:
    """Log p / (1 - p); p = 1 would give infinity and stops short of it."""
    logprob = jnp.minimum(logprob, -1e-6)
    return logprob - jnp.log(-jnp.expm1(logprob))


def kto(ratio: Array, desirable: Array, anchor: Array, beta: float, lambdas: tuple[float, float] = (1.0, 1.0)) -> Array:
    """Kahneman-Tversky optimisation of single answers (arXiv 2402.01306, equations 7 and 8).

    ratio: log-ratios h. desirable: bool. anchor: z0, see `kto_anchor`. lambdas: weights of desirable and of other
    answers. Gives lambda (1 - sigmoid(+-(beta h - z0))).
    """
    gain = beta * ratio - anchor
    return jnp.where(desirable, lambdas[0] * jax.nn.sigmoid(-gain), lambdas[1] * jax.nn.sigmoid(gain))


def kto_anchor(mismatched_ratio: Array, weights: Array, beta: float) -> Array:
    """z0 = max(0, beta KL estimate): the mean log-ratio of answers to other prompts, without a gradient."""
    weights = jnp.broadcast_to(weights, mismatched_ratio.shape)
    mean = jnp.sum(jnp.where(weights != 0, weights * mismatched_ratio, 0)) / jnp.maximum(jnp.sum(weights), 1e-9)
    return jax.lax.stop_gradient(jnp.maximum(beta * mean, 0))


def plackett_luce(ratios_K: Array, beta: float) -> Array:
    """Of rankings [..., K], best first: -sum_i log(exp(beta h_i) / sum_{j >= i} exp(beta h_j)) (arXiv 2305.18290, A.3).

    With K = 2 this is `sigmoid`.
    """
    z_K = beta * ratios_K
    rest_K = jax.lax.cumlogsumexp(z_K, axis=z_K.ndim - 1, reverse=True)
    return jnp.sum(rest_K - z_K, axis=-1)
