"""Divergences and their gradients beside TRL's generalised Jensen-Shannon divergence, where trl and torch are there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmlab.objectives.divergence import forward_kl, jensen_shannon, reverse_kl

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
