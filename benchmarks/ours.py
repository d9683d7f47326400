"""The train step of lmlab as the benchmarks call it: what a user's run computes, at the peers' optimiser settings."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import peers
from lmlab.core.types import TokenBatch
from lmlab.models.config import TransformerConfig
from lmlab.models.transformer import transformer
from lmlab.objectives.next_token import next_token
from lmlab.optim.chain import build_optimizer
from lmlab.optim.config import OptimConfig, ScheduleConfig
from lmlab.train.state import init_state
from lmlab.train.step import make_step


def make_update(config: TransformerConfig, shape: tuple[int, int], seed: int) -> Callable[[np.ndarray], Any]:
    """`update(tokens_BT) -> (state, metrics)`: starts one step and returns before it is done.

    shape: of the tokens, (B, T + 1), int32. The metrics and norms that every run gets are part of a step.
    """
    schedule = ScheduleConfig(peak=peers.LEARNING_RATE, warmup=0, decay="constant")
    optim = OptimConfig(
        schedule=schedule, b1=peers.BETA_1, b2=peers.BETA_2, eps=peers.ADAM_EPS, weight_decay=peers.WEIGHT_DECAY,
        no_decay=(), clip=0.0,
    )  # fmt: skip
    lm = transformer(config)
    tx = build_optimizer(optim, lm.axes, 1000)
    state = init_state(lm.init, tx, seed)
    step = jax.jit(make_step(next_token(lm), tx), donate_argnums=0)
    ones, positions = jnp.ones(shape, jnp.int32), jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)

    def update(tokens_BT: np.ndarray) -> Any:
        nonlocal state
        state, metrics = step(state, TokenBatch(jnp.asarray(tokens_BT), ones, positions, ones.astype(bool)))
        return state, metrics

    return update
