"""From a config to an optax chain. The rules are optax's own; here they get schedule, masks and matrix axes."""

from typing import Any

import jax
import optax

from lmlab.core.errors import check
from lmlab.optim.config import GaloreConfig, OptimConfig, ScheduleConfig
from lmlab.optim.galore import scale_by_galore
from lmlab.optim.groups import is_names, matching, matrix_axes
from lmlab.optim.matrices import by_axes
from lmlab.optim.moments import KEEP, RESET, ROTATE, subspace_adam, with_shapes_of_updates
from lmlab.optim.precision import master_weights, stochastic_rounding
from lmlab.optim.quantised import BFLOAT16, FLOAT32, INT4, SIGNED8, SQUARE8
from lmlab.optim.residual import Lift, apollo, fira, frugal, plain
from lmlab.optim.subspace import (
    cholesky_qr,
    exact_svd,
    gaussian,
    gram,
    householder,
    newton_schulz,
    random_orthonormal,
    randomised,
    subspace_iteration,
)
from lmlab.optim.timing import lazy, staggered, together


def build_schedule(config: ScheduleConfig, steps: int) -> optax.Schedule:
    """Learning rate by step, for a run of `steps`."""
    warmup = _length(config.warmup, steps)
    cooldown = _length(config.cooldown, steps) if config.decay == "wsd" else 0
    check(warmup + cooldown <= steps, "optim.schedule.warmup", config.warmup,
          f"warm-up and cool-down of at most {steps} steps together")  # fmt: skip
    rest, end = steps - warmup, config.peak * config.end
    after = {
        "cosine": lambda: optax.cosine_decay_schedule(config.peak, max(rest, 1), alpha=config.end),
        "linear": lambda: optax.linear_schedule(config.peak, end, max(rest, 1)),
        "wsd": lambda: optax.join_schedules(
            [optax.constant_schedule(config.peak), optax.linear_schedule(config.peak, end, max(cooldown, 1))],
            [rest - cooldown],
        ),
        "constant": lambda: optax.constant_schedule(config.peak),
    }[config.decay]()
    if not warmup:
        return after
    # The first step already moves: it has rate peak / warmup, not 0.
    rise = optax.linear_schedule(config.peak / warmup, config.peak, warmup - 1) if warmup > 1 else after
    return optax.join_schedules([rise, after], [warmup])


def _length(value: float, steps: int) -> int:
    return round(value * steps) if value < 1 else int(value)


def build_optimizer(config: OptimConfig, axes: Any, steps: int, seed: int = 0) -> optax.GradientTransformation:
    """Clip -> rule -> + weight_decay * params -> * -rate(step): decay is decoupled and masked alike for all rules.

    axes: logical axis names by parameter (`LM.axes`). They tell Muon and GaLore their matrices, which stacked layers
    and head axes hide from a look at the rank. seed: of stochastic rounding and of random bases. Unless
    `config.parameters` is float32 the parameters must be bfloat16 (`cast_parameters`); the chain itself runs in float32
    always.
    """
    decayed = jax.tree.map(lambda skip: not skip, matching(axes, config.no_decay))
    chain = optax.chain(
        optax.clip_by_global_norm(config.clip) if config.clip else optax.identity(),
        _projected(config, axes, seed) if config.galore.rank else _rule(config, axes),
        optax.add_decayed_weights(config.weight_decay, mask=decayed) if config.weight_decay else optax.identity(),
        optax.scale_by_learning_rate(build_schedule(config.schedule, steps)),
    )
    return {
        "float32": lambda: chain,
        "bfloat16_master": lambda: master_weights(chain),
        "bfloat16_stochastic": lambda: stochastic_rounding(chain, seed),
    }[config.parameters]()


def _rule(config: OptimConfig, axes: Any) -> optax.GradientTransformation:
    b1, b2 = config.b1, config.b2
    return {
        "adamw": lambda: optax.scale_by_adam(b1, b2, config.eps),
        "lion": lambda: optax.scale_by_lion(b1, b2),
        # As optax.adafactor chains them, less the scaling by parameter size (arXiv 1804.04235).
        "adafactor": lambda: optax.chain(
            with_shapes_of_updates(optax.scale_by_factored_rms()),
            optax.clip_by_block_rms(1.0),
            optax.ema(b1, debias=False),
        ),
        "muon": lambda: _scale_by_muon(config, axes),
        "sgd": lambda: optax.trace(b1) if b1 else optax.identity(),
    }[config.rule]()


def _projected(config: OptimConfig, axes: Any, seed: int) -> optax.GradientTransformation:
    """The rule on projections of the hidden matrices, and as it is on everything else."""
    galore, policy = config.galore, {"keep": KEEP, "reset": RESET, "rotate": ROTATE}[config.galore.moments]
    stores = {32: (FLOAT32, FLOAT32), 8: (SIGNED8, SQUARE8)}[galore.moment_bits]
    adam = subspace_adam(config.b1, config.b2, config.eps, policy=policy, mu_store=stores[0], nu_store=stores[1])
    orthonormalise = {"householder": householder, "cholesky": cholesky_qr, "newton_schulz": newton_schulz}
    basis = orthonormalise[galore.orthonormalise]
    return scale_by_galore(
        by_axes(axes, galore.include), galore.rank, side=galore.side, seed=seed,
        inner=adam if config.rule == "adamw" else _rule(config, axes),
        refresh={
            "subspace": subspace_iteration(orthonormalise=basis), "randomised": randomised(orthonormalise=basis),
            "svd": exact_svd, "gram": gram, "gaussian": gaussian, "orthonormal": random_orthonormal,
        }[galore.refresh],
        timing={"together": together, "stagger": staggered, "lazy": lazy}[galore.timing](galore.refresh_every),
        lift=_lift(galore),
        store={"float32": FLOAT32, "bfloat16": BFLOAT16, "int4": INT4, "drawn": None}[galore.projectors],
    )  # fmt: skip


def _lift(galore: GaloreConfig) -> Lift:
    return {
        "galore": lambda: plain(galore.scale),
        "fira": lambda: fira(galore.scale),
        "apollo": lambda: apollo(galore.scale),
        "apollo_mini": lambda: apollo(galore.scale, per="tensor"),
        "frugal": lambda: frugal(galore.scale),
    }[galore.update]()


def _scale_by_muon(config: OptimConfig, axes: Any) -> optax.GradientTransformation:
    """Optax's Muon on the hidden matrices (updates scaled to AdamW's size, arXiv 2502.16982), Adam elsewhere."""

    def dimensions(names: tuple[str, ...]) -> optax.contrib.MuonDimensionNumbers | None:
        found = matrix_axes(names)
        return found and optax.contrib.MuonDimensionNumbers(reduction_axis=found.rows, output_axis=found.columns)

    muon = optax.contrib.muon(
        1.0, beta=config.b2, eps=config.eps, adam_b1=config.b1, adam_b2=config.b2, consistent_rms=0.2,
        muon_weight_dimension_numbers=jax.tree.map(dimensions, axes, is_leaf=is_names),
    )  # fmt: skip
    # Rate 1 and the sign undone make of the whole optimiser the rule alone.
    return optax.chain(muon, optax.scale(-1.0))
