"""A TokenFormer's layer beside a dense one of equal operations: `python -m benchmarks.tokenformer`.

Both are layers of the same decoder, of the same width, heads and rows: Pattentions of n = width parameter tokens (4 n
in place of the feed-forward), and linear maps with a GELU feed-forward whose width makes the multiplications the same,
6 times that of the residual stream. Timed in turns: the forward pass, and gradient plus AdamW. Prints milliseconds
(medians); as its last line one JSON object of time over the dense layer's (`forward_ratio`, `step_ratio`).
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks.timing import median_ratio, take_turns
from lmlab.core.errors import UserError, check
from lmlab.core.runtime import prepare
from lmlab.models.build import language_model
from lmlab.models.config import (
    AttentionConfig,
    ExecutionConfig,
    MLPConfig,
    ModelConfig,
    TokenFormerConfig,
    TransformerConfig,
)

DENSE, OURS = "dense", "tokenformer"


def configs(width: int, layers: int, length: int, dtype: Any) -> dict[str, ModelConfig]:
    """Both models; the vocabulary is not read from or written to."""
    shared: dict[str, Any] = {
        "vocab_size": 8, "layers": layers, "width": width, "max_length": length, "norm": "layer",
        "attention": AttentionConfig(heads=max(width // 64, 1)), "execution": ExecutionConfig(0, compute_dtype=dtype),
    }  # fmt: skip
    dense = TransformerConfig(**shared, mlp=MLPConfig(6 * width, "gelu"))
    return {DENSE: dense, OURS: TokenFormerConfig(**shared, rotary=dense.rotary)}


def arms(config: ModelConfig, rows: int, length: int, seed: int) -> dict[str, Callable[[], Any]]:
    """Calls of the compiled forward pass, and of a step that keeps its state."""
    lm, tx = language_model(config), optax.adamw(1e-4)
    params = lm.init(jax.random.key(seed))
    x_BTD = jax.random.normal(jax.random.key(seed + 1), (rows, length, config.width))
    slope_BTD = jax.random.normal(jax.random.key(seed + 2), x_BTD.shape)

    def forward(params: Any, x_BTD: Any) -> Any:
        return lm.apply(params, x_BTD)[0]

    def step(params: Any, state: Any, x_BTD: Any, slope_BTD: Any) -> Any:
        loss = lambda params: jnp.sum(forward(params, x_BTD).astype(jnp.float32) * slope_BTD) / x_BTD.size
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    run, advance = jax.jit(forward), jax.jit(step, donate_argnums=(0, 1))
    held = [jax.tree.map(jnp.copy, params), tx.init(params)]

    def train() -> Any:
        held[:] = advance(*held, x_BTD, slope_BTD)
        return held

    return {"forward": lambda: run(params, x_BTD), "step": train}


def main(argv: list[str] | None = None) -> int:
    """Measure both passes."""
    prepare(compile_cache=False)
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        check(args.rounds >= 1, "--rounds", args.rounds, "at least 1")
        both = configs(args.width, args.layers, args.length, args.dtype)
    except UserError as error:
        print(f"tokenformer: {error}", file=sys.stderr)
        return 2
    assert both[DENSE].layer_weights == both[OURS].layer_weights
    made = {name: arms(config, args.rows, args.length, args.seed) for name, config in both.items()}
    print(f"{jax.devices()[0].device_kind}, {args.dtype}; {args.layers} layers of width {args.width}, "
          f"{both[DENSE].layer_weights:,} weights each; {args.rows} x {args.length} tokens")  # fmt: skip
    result = {}
    for part in ("forward", "step"):
        seconds = take_turns({name: each[part] for name, each in made.items()}, args.rounds)
        result[f"{part}_ratio"] = round(median_ratio(seconds[OURS], seconds[DENSE]), 3)
        shown = ", ".join(f"{name} {1e3 * statistics.median(times):.1f} ms" for name, times in seconds.items())
        print(f"{part:8s} {shown}, ratio {result[f'{part}_ratio']}", flush=True)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
