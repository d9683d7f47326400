"""The four arms of In-Context Pretraining: documents in related or in random order, attention across them or not."""

import math
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np

from experiments.results import say
from lmlab.core.types import Params
from lmlab.data.stream import Stream
from lmlab.models.lm import LM
from lmlab.models.rows import Scope, read_rows
from lmlab.objectives.next_token import next_token
from lmlab.optim.chain import build_optimizer
from lmlab.optim.config import OptimConfig, ScheduleConfig
from lmlab.train.state import new_state
from lmlab.train.step import make_step

SCOPES: tuple[Scope, ...] = ("row", "document")
"""What a token attends to, and where positions begin."""


def trained_arms(
    lm: LM, streams: Mapping[str, Sequence[Stream]], steps: int, peak: float
) -> Iterator[tuple[Scope, LM, dict[str, Params]]]:  # fmt: skip
    """For either scope of attention the model that reads so, and the parameters [S, ...] of each order.

    streams: of each order, one for each of S seeds.
    """
    for scope in SCOPES:
        say(f"attention to the {scope}")
        reader = read_rows(lm, scope, scope)
        params = train(reader, [stream for seeds in streams.values() for stream in seeds], steps, peak)
        dealt = jax.tree.map(lambda x: x.reshape(len(streams), -1, *x.shape[1:]), params)
        yield scope, reader, {order: jax.tree.map(lambda x, i=i: x[i], dealt) for i, order in enumerate(streams)}


def train(lm: LM, streams: Sequence[Stream], steps: int, peak: float) -> Params:
    """Parameters [S, ...] after training on one stream each, from parameters of their own."""
    schedule = ScheduleConfig(peak=peak, warmup=0.1, end=0.0)
    tx = build_optimizer(OptimConfig(schedule=schedule), lm.axes, steps)
    step = make_step(next_token(lm), tx)
    every = jax.vmap(lambda state, batch: step(state, batch)[0])
    advance = jax.jit(
        lambda states, rows: jax.lax.scan(lambda states, batch: (every(states, batch), None), states, rows)[0],
        donate_argnums=0,
    )
    keys = jax.random.split(jax.random.key(0), len(streams))
    states = jax.jit(jax.vmap(lambda key: new_state(lm.init(key), tx, key)))(keys)
    count = math.gcd(steps, 50)
    stack = lambda *batches: np.stack(batches)
    rows = zip(*(stream.batches(0, steps) for stream in streams), strict=True)
    for _ in range(steps // count):
        states = advance(states, jax.tree.map(stack, *(jax.tree.map(stack, *next(rows)) for _ in range(count))))
    return states.params
