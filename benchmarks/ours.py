"""The train step of lmlab as the benchmarks call it: what a user's run computes, at the peers' optimiser settings."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import peers
from lmlab.core.types import TokenBatch
from lmlab.models.config import AttentionConfig, ExecutionConfig, MLPConfig, TransformerConfig
from lmlab.models.lm import LM
from lmlab.models.transformer import transformer
from lmlab.objectives.next_token import next_token
from lmlab.optim.chain import build_optimizer
from lmlab.optim.config import OptimConfig, ScheduleConfig
from lmlab.train.state import init_state
from lmlab.train.step import make_step


def llama(execution: ExecutionConfig) -> LM:
    """The model whose sizes the peers share."""
    return transformer(TransformerConfig(
        vocab_size=peers.VOCAB, layers=peers.N_LAYERS, width=peers.WIDTH, max_length=peers.SEQ_LEN,
        norm_eps=peers.NORM_EPS, attention=AttentionConfig(heads=peers.N_HEADS), mlp=MLPConfig(width=peers.FFN),
        execution=execution,
    ))  # fmt: skip


def optimizer(lm: LM) -> optax.GradientTransformation:
    """AdamW at the peers' settings."""
    schedule = ScheduleConfig(peak=peers.LEARNING_RATE, warmup=0, decay="constant")
    optim = OptimConfig(
        schedule=schedule, b1=peers.BETA_1, b2=peers.BETA_2, eps=peers.ADAM_EPS, weight_decay=peers.WEIGHT_DECAY,
        no_decay=(), clip=0.0,
    )  # fmt: skip
    return build_optimizer(optim, lm.axes, 1000)


def make_update(lm: LM, shape: tuple[int, int], seed: int) -> Callable[[np.ndarray], Any]:
    """`update(tokens_BT) -> (state, metrics)`: starts one step and returns before it is done.

    shape: of the tokens, (B, T + 1), int32. The metrics and norms that every run gets are part of a step.
    """
    tx = optimizer(lm)
    state = init_state(lm.init, tx, seed)
    step = jax.jit(make_step(next_token(lm), tx), donate_argnums=0)
    ones, positions = jnp.ones(shape, jnp.int32), jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)

    def update(tokens_BT: np.ndarray) -> Any:
        nonlocal state
        state, metrics = step(state, TokenBatch(jnp.asarray(tokens_BT), ones, positions, ones.astype(bool)))
        return state, metrics

    return update
