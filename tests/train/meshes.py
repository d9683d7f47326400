"""A small model, its batches, and runs of it on meshes, for the tests of the parallel step."""

import jax
import optax

from lmlab.models.config import AttentionConfig, MLPConfig
from lmlab.testing.tiny import random_batch, tiny_lm
from lmlab.train import parallel
from lmlab.train.config import ParallelConfig
from lmlab.train.state import init_state
from lmlab.train.step import make_step

STEPS = 20
MESHES = [(8, 1, 1, 1), (1, 8, 1, 1), (1, 1, 8, 1), (2, 1, 1, 4), (2, 2, 1, 2), (1, 2, 2, 2)]
MIXED = [(2, 1, 1, 4), (1, 2, 2, 2)]
"""Those of which every objective is shown; together they divide every axis."""
BATCHES = [random_batch(rows=8, seed=seed) for seed in range(STEPS)]
TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, eps=1e-3))
INVOLUNTARY = "Involuntary full rematerialization"


def small_lm(**changes):
    """Sizes that every mesh here divides."""
    sizes = {
        "vocab_size": 8, "attention": AttentionConfig(heads=8, kv_heads=4, window=changes.pop("window", 0)),
        "mlp": MLPConfig(width=24),
    }  # fmt: skip
    return tiny_lm(**(sizes | changes))


LM = small_lm()


def placed(lm, tx, mesh, objective=None, **options):
    """A step and a state on a mesh."""
    shapes = parallel.abstract_state(lm.init, tx)
    shardings = parallel.state_shardings(shapes, parallel.param_shardings(lm.axes, shapes.params, mesh))
    step = objective and parallel.placed_step(make_step(objective, tx, **options), shardings)
    return step, init_state(lm.init, tx, 0, shardings)


def trained(objective, sizes=None, lm=LM, tx=TX, batches=BATCHES, **options):
    """Parameters and last metrics after all batches, on one device or on a mesh."""
    if sizes is None:
        step, state = jax.jit(make_step(objective, tx, **options)), init_state(lm.init, tx, 0)
        for batch in batches:
            state, metrics = step(state, batch)
        return jax.device_get((state.params, metrics))
    mesh = parallel.make_mesh(ParallelConfig(*sizes))
    with jax.set_mesh(mesh):
        step, state = placed(lm, tx, mesh, objective, **options)
        for batch in batches:
            state, metrics = step(state, parallel.place_batch(batch, mesh))
    return jax.device_get((state.params, metrics))
