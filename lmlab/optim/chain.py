"""From a config to an optax chain. The rules are optax's own; here they get schedule, masks and matrix axes."""

from typing import Any

import jax
import optax

from lmlab.core.errors import check
from lmlab.optim.config import OptimConfig, ScheduleConfig
from lmlab.optim.groups import is_names, matching, matrix_axes
from lmlab.optim.precision import master_weights, stochastic_rounding


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

    axes: logical axis names by parameter (`LM.axes`). They tell Muon its matrices, which stacked layers and
    head axes hide from a look at the rank. seed: of stochastic rounding. Unless `config.parameters` is float32
    the parameters must be bfloat16 (`cast_parameters`); the chain itself runs in float32 always.
    """
    b1, b2 = config.b1, config.b2
    rule = {
        "adamw": lambda: optax.scale_by_adam(b1, b2, config.eps),
        "lion": lambda: optax.scale_by_lion(b1, b2),
        # As optax.adafactor chains them, less the scaling by parameter size (arXiv 1804.04235).
        "adafactor": lambda: optax.chain(
            optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.ema(b1, debias=False)
        ),
        "muon": lambda: _scale_by_muon(config, axes),
        "sgd": lambda: optax.trace(b1) if b1 else optax.identity(),
    }[config.rule]()
    decayed = jax.tree.map(lambda skip: not skip, matching(axes, config.no_decay))
    chain = optax.chain(
        optax.clip_by_global_norm(config.clip) if config.clip else optax.identity(),
        rule,
        optax.add_decayed_weights(config.weight_decay, mask=decayed) if config.weight_decay else optax.identity(),
        optax.scale_by_learning_rate(build_schedule(config.schedule, steps)),
    )
    return {
        "float32": lambda: chain,
        "bfloat16_master": lambda: master_weights(chain),
        "bfloat16_stochastic": lambda: stochastic_rounding(chain, seed),
    }[config.parameters]()


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
