"""Divergences by the whole arrays, their limits, buckets of the best tokens, and those of optax."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmlab.core.types import TopK
from lmlab.objectives.divergence import (
    against_logits,
    against_top_k,
    chunked_divergence,
    forward_kl,
    jensen_shannon,
    merged,
    reverse_kl,
    top_k,
)

DIVERGENCES = {
    "forward": forward_kl,
    "reverse": reverse_kl,
    "js 0.5": jensen_shannon(0.5),
    "js 0.1": jensen_shannon(0.1),
}
V = 11


def unembed(head, hidden):
    return jnp.einsum("...d,vd->...v", hidden, head["w"], preferred_element_type=jnp.float32)


def log_probabilities(seed, *shape, scale=2.0):
    return jax.nn.log_softmax(scale * jax.random.normal(jax.random.key(seed), shape))


def arrays(dtype=jnp.float32):
    """Heads of both, hidden states of both, labels and weights: place 2 of every row counts nothing."""
    keys = jax.random.split(jax.random.key(0), 6)
    head, taught = ({"w": jax.random.normal(key, (V, 5), dtype)} for key in keys[:2])
    hidden, target = (jax.random.normal(key, (3, 7, 5), dtype) for key in keys[2:4])
    labels = jax.random.randint(keys[4], (3, 7), 0, V)
    return head, taught, hidden, target, labels, jax.random.uniform(keys[5], (3, 7)) * (jnp.arange(7) != 2)[None]


def ours(divergence, temperature, chunk, head, hidden, taught, target, labels, weights):
    compare = against_logits(unembed, temperature)
    return chunked_divergence(
        compare, divergence, temperature, unembed, chunk, None, (head, taught), hidden, target, labels, weights
    )


def whole(divergence, temperature, head, hidden, taught, target, weights):
    logq, logp = (jax.nn.log_softmax(unembed(*x) / temperature) for x in ((taught, target), (head, hidden)))
    return temperature**2 * jnp.sum(weights * divergence(logq, logp))


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize(("chunk", "temperature"), [(1, 1.0), (3, 2.0), (50, 0.5)])
def test_sums_and_gradients_are_those_of_all_logits(name, chunk, temperature):
    head, taught, hidden, target, labels, weights = arrays()
    one = lambda head, hidden: (
        ours(DIVERGENCES[name], temperature, chunk, head, hidden, taught, target, labels, weights).loss
    )
    two = lambda head, hidden: whole(DIVERGENCES[name], temperature, head, hidden, taught, target, weights)
    both = [jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(head, hidden) for f in (one, two)]
    chex.assert_trees_all_close(*both, rtol=2e-5, atol=2e-5)


def test_no_gradient_flows_to_the_teacher_nor_from_the_other_sums():
    head, taught, hidden, target, labels, weights = arrays()
    loss = lambda taught, target, weights: ours(forward_kl, 1.0, 3, head, hidden, taught, target, labels, weights).loss
    slopes = jax.grad(loss, argnums=(0, 1, 2))(taught, target, weights)
    chex.assert_trees_all_equal(slopes, jax.tree.map(jnp.zeros_like, slopes))
    others = lambda hidden: sum(ours(forward_kl, 1.0, 3, head, hidden, taught, target, labels, weights)[1:])
    assert not jax.grad(others)(hidden).any()


def test_the_gradient_of_the_forward_kl_is_p_minus_q_at_every_place():
    logits = jax.random.normal(jax.random.key(0), (2, 4, V))
    taught = jax.random.normal(jax.random.key(1), (2, 4, V))
    weights = jnp.asarray([[1.0, 1, 0, 1], [1, 0, 1, 1]])
    identity = lambda head, x: x
    compare = against_logits(identity)
    loss = lambda x: (
        chunked_divergence(
            compare, forward_kl, 1.0, identity, 3, None, ({}, {}), x, taught, jnp.zeros((2, 4), int), weights
        ).loss
    )
    wanted = weights[..., None] * (jax.nn.softmax(logits) - jax.nn.softmax(taught))
    np.testing.assert_allclose(jax.grad(loss)(logits), wanted, atol=1e-6)


def test_metrics_by_hand():
    head, taught, hidden, target, labels, weights = arrays()
    sums = ours(reverse_kl, 1.0, 2, head, hidden, taught, target, labels, weights)
    q, p = (np.asarray(jax.nn.log_softmax(unembed(*x)), np.float64) for x in ((taught, target), (head, hidden)))
    total = lambda values: pytest.approx(float((np.asarray(weights) * values).sum()), rel=1e-5)
    assert float(sums.agreement) == total(q.argmax(-1) == p.argmax(-1))
    assert float(sums.entropy) == total(-(np.exp(q) * q).sum(-1))
    assert float(sums.nll) == total(-np.take_along_axis(p, np.asarray(labels)[..., None], -1)[..., 0])


def test_what_weighs_nothing_may_be_anything():
    head, taught, hidden, target, labels, weights = arrays()
    clean = jax.value_and_grad(lambda h: ours(forward_kl, 1.0, 3, head, h, taught, target, labels, weights).loss)(
        hidden
    )
    target, labels = target.at[:, 2].set(jnp.nan), labels.at[:, 2].set(-1000)
    dirty = jax.value_and_grad(lambda h: ours(forward_kl, 1.0, 3, head, h, taught, target, labels, weights).loss)(
        hidden
    )
    chex.assert_trees_all_equal(dirty, clean)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergences_are_positive_and_zero_where_both_say_the_same(name):
    logq, logp = log_probabilities(0, 200, 5), log_probabilities(1, 200, 5)
    assert float(DIVERGENCES[name](logq, logp).min()) > 0
    np.testing.assert_allclose(DIVERGENCES[name](logq, logq), 0, atol=1e-6)


def test_forward_and_reverse_are_those_of_optax_and_of_each_other():
    logq, logp = log_probabilities(0, 50, 5), log_probabilities(1, 50, 5)
    np.testing.assert_allclose(forward_kl(logq, logp), optax.losses.kl_divergence(logp, jnp.exp(logq)), rtol=1e-5)
    np.testing.assert_allclose(reverse_kl(logq, logp), optax.losses.kl_divergence(logq, jnp.exp(logp)), rtol=1e-5)


def test_a_token_that_one_side_never_says_gives_no_nan():
    logq, logp = jnp.log(jnp.asarray([0.5, 0.5, 0.0])), jnp.log(jnp.asarray([0.25, 0.25, 0.5]))
    assert float(forward_kl(logq, logp)) == pytest.approx(np.log(2))
    assert float(reverse_kl(logq, logp)) == np.inf
    slope = jax.grad(lambda x: jensen_shannon(0.5)(logq, jax.nn.log_softmax(x)))(logp)
    assert np.isfinite(slope).all()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_tokens_that_nobody_can_say_change_nothing(name):
    logits, taught = (jax.random.normal(jax.random.key(i), (6, 5)) for i in (0, 1))
    more = lambda x: jnp.pad(x, ((0, 0), (0, 2)), constant_values=-jnp.inf)

    def loss(x, taught):
        return jnp.sum(DIVERGENCES[name](jax.nn.log_softmax(taught), jax.nn.log_softmax(x)))

    value, slope = jax.value_and_grad(loss)(logits, taught)
    wider, slopes = jax.value_and_grad(loss)(more(logits), more(taught))
    assert float(wider) == pytest.approx(float(value), rel=1e-5)
    np.testing.assert_allclose(slopes, np.pad(slope, ((0, 0), (0, 2))), atol=1e-6)
    stored = top_k(taught, 5)
    merging = lambda x: jnp.sum(DIVERGENCES[name](stored.logprobs_BAK, merged(x, stored.ids_BAK)))
    np.testing.assert_allclose(jax.grad(merging)(more(logits)), np.pad(slope, ((0, 0), (0, 2))), atol=1e-6)


def test_jensen_shannon_is_symmetric_in_the_middle_and_tends_to_both_others():
    with jax.enable_x64(True):
        logq, logp = (log_probabilities(i, 20, 5).astype(jnp.float64) for i in (0, 1))
        logq, logp = jax.nn.log_softmax(logq), jax.nn.log_softmax(logp)
        js = jensen_shannon(0.5)
        np.testing.assert_allclose(js(logq, logp), js(logp, logq), rtol=1e-12)
        np.testing.assert_allclose(jensen_shannon(0.2)(logq, logp), jensen_shannon(0.8)(logp, logq), rtol=1e-12)
        b = 1e-6
        np.testing.assert_allclose(jensen_shannon(b)(logq, logp) / b, forward_kl(logq, logp), rtol=1e-3)
        np.testing.assert_allclose(jensen_shannon(1 - b)(logq, logp) / b, reverse_kl(logq, logp), rtol=1e-3)
    for b in (0.0, 1.0):
        with pytest.raises(ValueError, match="limits"):
            jensen_shannon(b)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_buckets_are_a_lower_bound_that_rises_with_k_to_the_whole(name):
    logits, taught = (3 * jax.random.normal(jax.random.key(i), (40, V)) for i in (0, 1))
    divergence = DIVERGENCES[name]
    full = divergence(jax.nn.log_softmax(taught), jax.nn.log_softmax(logits))
    found = []
    for k in (1, 2, 5, V):
        stored = top_k(taught[None], k)
        logq, logp, best = against_top_k()((), stored, logits[None])
        chex.assert_trees_all_equal(best[0], jnp.argmax(taught, -1).astype(best.dtype))
        np.testing.assert_allclose(jnp.exp(logp).sum(-1), 1, atol=1e-5)
        found.append(np.asarray(divergence(logq, logp)[0]))
    assert (np.diff(found, axis=0) >= -1e-6).all()
    assert (found[-1] <= full + 1e-6).all()
    assert (found[0] < full - 1e-3).any()
    np.testing.assert_allclose(found[-1], full, atol=2e-6)


def test_a_tail_of_nothing_keeps_its_logarithm_and_a_small_one_its_value():
    sure = jnp.asarray([[40.0, 0.0, 0.0]])
    assert float(merged(sure, jnp.asarray([[0]]))[0, 1]) == pytest.approx(np.log(1e-9))
    small = jnp.asarray([[15.0, 0.0, 0.0]])
    wanted = np.log(2) - np.logaddexp(15, np.log(2))
    assert float(merged(small, jnp.asarray([[0]]))[0, 1]) == pytest.approx(wanted, rel=1e-6)
    value, slope = jax.value_and_grad(lambda x: forward_kl(jnp.log(jnp.asarray([[1.0, 1e-9]])),
                                                           merged(x, jnp.asarray([[0]]))).sum())(sure)  # fmt: skip
    assert np.isfinite(value)
    assert np.isfinite(slope).all()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_stored_in_bfloat16_all_tokens_give_nearly_the_gradient_of_the_whole(temperature):
    head, taught, hidden, target, labels, weights = arrays()
    stored = top_k(unembed(taught, target) / temperature, V)
    stored = TopK(stored.logprobs_BAK.astype(jnp.bfloat16), stored.ids_BAK)
    one = lambda h: (
        chunked_divergence(
            against_top_k(temperature),
            forward_kl,
            temperature,
            unembed,
            3,
            None,
            (head, ()),
            h,
            stored,
            labels,
            weights,
        ).loss
    )
    two = lambda h: whole(forward_kl, temperature, head, h, taught, target, weights)
    (value, slope), (wanted, other) = (jax.value_and_grad(f)(hidden) for f in (one, two))
    assert float(value) == pytest.approx(float(wanted), rel=0.02)
    assert float(jnp.linalg.norm(slope - other) / jnp.linalg.norm(other)) < 0.02


def test_gradients_come_back_in_their_types_and_float64_is_exact():
    head, taught, hidden, target, labels, weights = arrays(jnp.bfloat16)
    f = lambda head, hidden: ours(forward_kl, 1.0, 2, head, hidden, taught, target, labels, weights).loss
    value, slopes = jax.value_and_grad(f, argnums=(0, 1))(head, hidden)
    assert value.dtype == jnp.float32
    chex.assert_trees_all_equal_dtypes(slopes, (head, hidden))
    with jax.enable_x64(True):
        head, taught, hidden, target, labels, weights = jax.tree.map(
            lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, arrays()
        )
        wide = lambda head, hidden: jnp.einsum("...d,vd->...v", hidden, head["w"])
        one = lambda h: (
            chunked_divergence(
                against_logits(wide), reverse_kl, 1.0, wide, 3, None, (head, taught), h, target, labels, weights
            ).loss
        )
        logq, soften = jax.nn.log_softmax(wide(taught, target)), lambda h: jax.nn.log_softmax(wide(head, h))
        two = lambda h: jnp.sum(weights * reverse_kl(logq, soften(h)))
        chex.assert_trees_all_close(*(jax.value_and_grad(f)(hidden) for f in (one, two)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("target", ["logits", "top k"])
def test_neither_sides_logits_are_ever_held(target):
    vocab, rows, length, chunk = 4096, 8, 32, 2
    head = jax.ShapeDtypeStruct((vocab, 16), jnp.float32)
    hidden = jax.ShapeDtypeStruct((rows, length, 16), jnp.float32)
    stored = TopK(jax.ShapeDtypeStruct((rows, length, 9), jnp.bfloat16), jax.ShapeDtypeStruct((rows, length, 8), int))
    apply = lambda head, x: x @ head.T
    compare = against_logits(apply) if target == "logits" else against_top_k()
    taught, told = (head, hidden) if target == "logits" else ((), stored)

    def loss(head, hidden, taught, told):
        labels, weights = jnp.zeros((rows, length), int), jnp.ones((rows, length))
        return chunked_divergence(
            compare, forward_kl, 1.0, apply, chunk, None, (head, taught), hidden, told, labels, weights
        ).loss

    text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(head, hidden, taught, told).as_text()
    sizes = [np.prod([int(n) for n in part.split("x")[:-1] if n]) for part in
             (piece.split(">")[0] for piece in text.split("tensor<")[1:]) if "4096" in part]  # fmt: skip
    assert sizes
    assert max(sizes) <= max(rows * chunk * vocab, vocab * 16)


BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)


@pytest.mark.parametrize("beta", BETAS)
def test_trl_finds_the_same(beta):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    gkd = pytest.importorskip("trl.experimental.gkd", reason="trl is not installed")
    logits, taught = (np.asarray(3 * jax.random.normal(jax.random.key(i), (4, 6, 50))) for i in (0, 1))
    divergence = {0.0: forward_kl, 1.0: reverse_kl}.get(beta) or jensen_shannon(beta)
    for temperature in (1.0, 2.0):
        student = torch.tensor(logits, requires_grad=True)
        loss = gkd.GKDTrainer.generalized_jsd_loss(
            student, torch.tensor(taught), beta=beta, temperature=temperature, reduction="sum"
        )
        loss.backward()

        def mine(x, temperature=temperature):
            soften = lambda x: jax.nn.log_softmax(x / temperature)
            return jnp.sum(divergence(soften(taught), soften(x)))

        value, slope = jax.value_and_grad(mine)(logits)
        assert float(value) == pytest.approx(float(loss.detach()), rel=1e-5)
        np.testing.assert_allclose(slope, student.grad.numpy(), atol=1e-5)


def test_partial_sums_add_up():
    head, taught, hidden, target, labels, weights = arrays()
    f = partial(ours, jensen_shannon(0.3), 1.0, 2, head)
    one = lambda i: f(*(x if x is taught else x[i : i + 1] for x in (hidden, taught, target, labels, weights)))
    total = jax.tree.map(lambda *x: sum(x), *map(one, range(3)))
    chex.assert_trees_all_close(total, f(hidden, taught, target, labels, weights), rtol=1e-5)
