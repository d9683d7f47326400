"""Against the authors' code, stored and live (`make parity`), and against optax's GaLore."""

import importlib.util
import json

import jax
import numpy as np
import optax
import pytest
from galore_peer import CASES, EPS, GOLDENS, RANK, RATE, SCALE, SHAPES, SIDES, gradients, their_weights

from lmlab.optim.galore import galore, scale_by_galore
from lmlab.optim.matrices import by_path
from lmlab.optim.residual import plain
from lmlab.optim.subspace import exact_svd
from lmlab.optim.timing import together

STORED = json.loads(GOLDENS.read_text())
LIVE = all(importlib.util.find_spec(name) for name in ("torch", "transformers", "galore_torch"))


def their_adam(b1=0.9, b2=0.999):
    """Eps is added to the root before the bias correction; optax does so after it."""

    def update(gradients, state, params=None):
        _, state = optax.scale_by_adam(b1, b2).update(gradients, state)
        mean = optax.tree.bias_correction(state.mu, b1, state.count)
        share = (1 - b2**state.count) ** 0.5
        return jax.tree.map(lambda m, v: m * share / (v**0.5 + EPS), mean, state.nu), state

    return optax.GradientTransformation(optax.scale_by_adam().init, update)


def our_weights(side, shape):
    """Float32 [out, in]: the transposed kernel."""
    tx = galore(
        RATE, by_path(), RANK, refresh=exact_svd, timing=together(1000), inner=their_adam(),
        lift=plain(SCALE), side=SIDES[side],
    )  # fmt: skip
    kernel = np.zeros(shape[::-1], np.float32)
    state = tx.init({"w": kernel})
    update = jax.jit(tx.update)
    for gradient in gradients(shape):
        updates, state = update({"w": gradient.T}, state)
        kernel = kernel + updates["w"]
    return np.asarray(kernel).T


@pytest.mark.parametrize(("side", "shape"), CASES, ids=str)
def test_the_steps_of_the_authors_code(side, shape):
    ours = our_weights(side, shape)
    np.testing.assert_allclose(ours, STORED[f"{side} {shape}"], atol=1e-6)
    assert np.abs(ours).max() > 1e-3


@pytest.mark.skipif(not LIVE, reason="make parity installs galore-torch, torch and transformers")
@pytest.mark.parametrize(("side", "shape"), CASES, ids=str)
def test_the_steps_of_the_authors_code_live(side, shape):
    np.testing.assert_allclose(our_weights(side, shape), their_weights(side, shape), atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_optax_projects_the_other_side(shape):
    # Of a square matrix it projects the rows, as the authors' code does with the matrix as it is.
    side = "left" if shape[0] == shape[1] else "reverse_std"
    options = {"refresh": exact_svd, "timing": together(100), "lift": plain(1.0)}
    ours, theirs = (
        scale_by_galore(by_path(), RANK, side=side, **options),
        optax.contrib.scale_by_galore(rank=RANK, update_proj_gap=100),
    )
    states = [tx.init({"w": np.zeros(shape, np.float32)}) for tx in (ours, theirs)]
    updates = [jax.jit(tx.update) for tx in (ours, theirs)]
    for gradient in gradients(shape):
        (a, states[0]), (b, states[1]) = (
            update({"w": gradient}, state) for update, state in zip(updates, states, strict=True)
        )  # fmt: skip
        np.testing.assert_allclose(a["w"], b["w"], atol=2e-6)
