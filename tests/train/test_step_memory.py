"""A gradient is used up as soon as it is there, if layers lie apart and nothing asks for all gradients at once."""

import jax
import pytest

from lmlab.models.config import ExecutionConfig, MLPConfig
from lmlab.objectives.next_token import next_token
from lmlab.optim.chain import build_optimizer
from lmlab.optim.config import GaloreConfig, OptimConfig
from lmlab.testing.tiny import random_batch, tiny_lm
from lmlab.train.state import new_state
from lmlab.train.step import make_step


def temporary(clip, galore):
    """Temporary bytes of the compiled step, over those of the parameters."""
    lm = tiny_lm(layers=6, width=64, mlp=MLPConfig(width=192), execution=ExecutionConfig(stacked=False, remat="full"))
    tx = build_optimizer(OptimConfig(clip=clip, galore=galore), lm.axes, 10)
    state = jax.eval_shape(lambda key: new_state(lm.init(key), tx, key), jax.random.key(0))
    compiled = jax.jit(make_step(next_token(lm), tx), donate_argnums=0).lower(state, random_batch(rows=2)).compile()
    return compiled.memory_analysis().temp_size_in_bytes / sum(4 * x.size for x in jax.tree.leaves(state.params))


@pytest.mark.parametrize(
    ("galore", "most"),
    [
        (GaloreConfig(), 0.8),
        (GaloreConfig(rank=8, refresh="gram", include=("down",)), 0.8),
        (GaloreConfig(rank=8), 0.95),
    ],
    ids=["adamw", "one matrix a layer", "all matrices"],
)
def test_without_clipping_the_gradient_never_exists_as_a_whole(galore, most):
    # Clipping needs the gradient of everything before it changes anything. The rest is activations and refreshes.
    assert temporary(1.0, galore) > 1.5
    assert temporary(0.0, galore) < most
