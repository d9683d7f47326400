"""The loss of several predictions of each place equals the naive one, to the last digit in float64."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

from lmlab.objectives.cross_entropy import heads_cross_entropy


def unembed(head, hidden):
    return jnp.einsum("...d,vd->...v", hidden, head["w"], preferred_element_type=jnp.float32)


def arrays(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    head = {"w": jax.random.normal(keys[0], (11, 5), dtype)}
    hidden_BMTD = jax.random.normal(keys[1], (3, 2, 7, 5), dtype)
    labels_BMT = jax.random.randint(keys[2], (3, 2, 7), 0, 11)
    weights_BMT = jax.random.uniform(keys[3], (3, 2, 7)) * (jnp.arange(7) != 2)[None, None]
    return head, hidden_BMTD, labels_BMT, weights_BMT


@pytest.mark.parametrize("chunk", [1, 3, 7, 50])
def test_loss_and_gradients_equal_those_of_all_logits_under_optax(chunk):
    head, hidden, labels, weights = arrays()
    factors_M = jnp.asarray([0.3, -2.0])

    def ours(head, hidden):
        return jnp.sum(factors_M * heads_cross_entropy(unembed, head, hidden, labels, weights, 0.0, chunk).loss)

    def theirs(head, hidden):
        nll = optax.softmax_cross_entropy_with_integer_labels(unembed(head, hidden), labels)
        return jnp.sum(factors_M[None, :, None] * weights * nll)

    one, two = (jax.value_and_grad(f, argnums=(0, 1))(head, hidden) for f in (ours, theirs))
    chex.assert_trees_all_close(one, two, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 3, 7, 50])
def test_in_float64_loss_and_gradients_are_exact(chunk):
    with jax.enable_x64(True):
        head, hidden, labels, weights = arrays(jnp.float64)
        weights, factors_M = weights.astype(jnp.float64), jnp.asarray([0.3, -2.0])
        wide = lambda head, hidden: jnp.einsum("...d,vd->...v", hidden, head["w"])

        def ours(head, hidden):
            return jnp.sum(factors_M * heads_cross_entropy(wide, head, hidden, labels, weights, 0.1, chunk).loss)

        def theirs(head, hidden):
            logits = wide(head, hidden)
            log_z = jax.nn.logsumexp(logits, axis=-1)
            nll = log_z - jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
            return jnp.sum(factors_M[None, :, None] * weights * (nll + 0.1 * log_z**2))

        one, two = (jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(head, hidden) for f in (ours, theirs))
        chex.assert_trees_all_equal_dtypes(one, two)
        chex.assert_trees_all_close(one, two, rtol=1e-12, atol=1e-12)


def test_gradients_are_added_up_in_float32_and_come_back_in_their_types():
    head, hidden, labels, weights = arrays(jnp.bfloat16)
    f = lambda head, hidden: jnp.sum(heads_cross_entropy(unembed, head, hidden, labels, weights, 0.0, 2).loss)
    slopes = jax.grad(f, argnums=(0, 1))(head, hidden)
    chex.assert_trees_all_equal_dtypes(slopes, (head, hidden))
    wide = jax.grad(f, argnums=(0, 1))(*jax.tree.map(lambda x: x.astype(jnp.float32), (head, hidden)))
    error = jnp.max(jnp.abs(slopes[0]["w"] - wide[0]["w"])) / jnp.max(jnp.abs(wide[0]["w"]))
    assert float(error) < 2**-7
