"""The loss of several heads beside the fused cross-entropies of others; each is left out where it is not installed.

pip install jax-cce tokamax cut-cross-entropy torch

MaxText's MultiTokenPredictionBlock is not among them: that package does not install on Python 3.11. What a sequential
head computes is written out in tests/models/test_heads.py instead.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmlab.objectives.cross_entropy import heads_cross_entropy

KEYS = jax.random.split(jax.random.key(0), 3)
HEAD = {"w": jax.random.normal(KEYS[0], (256, 128))}
HIDDEN_BMTD = jax.random.normal(KEYS[1], (2, 3, 32, 128)) / 8
LABELS_BMT = jax.random.randint(KEYS[2], (2, 3, 32), 0, 256)
FACTORS_M = jnp.asarray([1.0, 0.5, 2.0])


def unembed(head, hidden):
    return jnp.einsum("...d,vd->...v", hidden, head["w"], precision="highest")


def ours(head, hidden):
    weights = jnp.ones(LABELS_BMT.shape)
    return jnp.sum(FACTORS_M * heads_cross_entropy(unembed, head, hidden, LABELS_BMT, weights, 0.0, 13).loss)


def jax_cce(rows_ND, labels_N, table_VD):
    return len(labels_N) * pytest.importorskip("jax_cce").linear_cross_entropy(
        rows_ND, table_VD, labels_N, chunk_size=64
    )


def tokamax(rows_ND, labels_N, table_VD):
    loss = pytest.importorskip("tokamax").linear_softmax_cross_entropy_loss
    return loss(rows_ND, labels_N, table_VD.T, implementation="xla")


@pytest.mark.parametrize("loss", [jax_cce, tokamax])
def test_loss_and_gradients_are_those_of_other_fused_ones_in_jax(loss, monkeypatch):
    monkeypatch.setattr("sys.argv", ["pytest"])  # tokamax reads its flags there

    def theirs(head, hidden):
        heads = [
            loss(hidden[:, i].reshape(-1, 128), LABELS_BMT[:, i].reshape(-1), head["w"]) for i in range(3)
        ]  # fmt: skip
        return jnp.sum(FACTORS_M * jnp.stack(heads))

    with jax.default_matmul_precision("highest"):
        one, two = (jax.value_and_grad(f, argnums=(0, 1))(HEAD, HIDDEN_BMTD) for f in (ours, theirs))
    chex.assert_trees_all_close(one, two, rtol=2e-5, atol=2e-5)


@pytest.mark.filterwarnings("ignore")
def test_loss_and_gradients_are_those_of_cut_cross_entropy():
    torch = pytest.importorskip("torch")
    pytest.importorskip("triton", reason="cut_cross_entropy does not load without triton")
    fused = pytest.importorskip("cut_cross_entropy").linear_cross_entropy
    table, hidden = (torch.tensor(np.asarray(x), requires_grad=True) for x in (HEAD["w"], HIDDEN_BMTD))
    labels = torch.tensor(np.asarray(LABELS_BMT), dtype=torch.int64)
    heads = [
        fused(hidden[:, i], table, labels[:, i], reduction="sum", impl="torch_compile") for i in range(3)
    ]  # fmt: skip
    total = sum(float(factor) * head for factor, head in zip(FACTORS_M, heads, strict=True))
    total.backward()
    value, (head_slope, hidden_slope) = jax.value_and_grad(ours, argnums=(0, 1))(HEAD, HIDDEN_BMTD)
    assert float(total) == pytest.approx(float(value), rel=1e-5)
    np.testing.assert_allclose(head_slope["w"], table.grad.numpy(), rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(hidden_slope, hidden.grad.numpy(), rtol=2e-5, atol=2e-5)
