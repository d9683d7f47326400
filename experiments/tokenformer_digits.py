"""A TokenFormer that reads images beside a ViT of equal parameters, on scikit-learn's handwritten digits.

    python -m experiments.tokenformer_digits [--smoke] [--out FOLDER]

1797 images of 8 x 8 pixels (the UCI test set of optical digits, carried by scikit-learn: pip install 'lmlab[vision]'),
a fifth of them held out. Both models are the decoders of `lmlab.models` behind `image_classifier`, trained alike; seeds
differ in parameters and in the order of images. Prints accuracy on held-out images, mean and standard deviation over
seeds; writes results.json and digits.svg.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments.results import deviation, keep
from lmlab.cli import exit_code
from lmlab.core.errors import UserError
from lmlab.core.types import Array, Batch, Key, Objective, Params, Ratio, Terms
from lmlab.models.build import language_model
from lmlab.models.config import (
    AttentionConfig,
    MLPConfig,
    ModelConfig,
    ParameterTokens,
    TokenFormerConfig,
    TransformerConfig,
)
from lmlab.models.vision import Classifier, image_classifier
from lmlab.optim.chain import build_optimizer
from lmlab.optim.config import OptimConfig, ScheduleConfig
from lmlab.report.plots import drawing
from lmlab.train.state import new_state
from lmlab.train.step import make_step

CLASSES, PATCH = 10, 2


@dataclass(frozen=True)
class Options:
    """Train a TokenFormer and a ViT of equal parameters on small images of digits."""

    out: str = "runs/tokenformer_digits"
    """Where results.json and the figure go."""
    smoke: bool = False
    """A few steps, to see that it runs."""
    seeds: int = 5
    """Trainings of each model."""
    steps: int = 600
    """Updates."""
    batch: int = 64
    """Images of an update."""
    peak: float = 2e-3
    """Highest learning rate of both."""
    width: int = 48
    """D of both."""
    layers: int = 3
    """L of both."""


def models(options: Options) -> dict[str, ModelConfig]:
    """A ViT has 12 D^2 weights a layer, a TokenFormer 16 D n: three quarters of the width make them equal."""
    shared: dict[str, Any] = {
        "vocab_size": CLASSES, "layers": options.layers, "width": options.width, "max_length": 17, "norm": "layer",
        "positions": "learned",
    }  # fmt: skip
    biased = AttentionConfig(heads=4, qkv_bias=True, out_bias=True)
    return {
        "ViT": TransformerConfig(**shared, attention=biased, mlp=MLPConfig(activation="gelu", bias=True)),
        "TokenFormer": TokenFormerConfig(
            **shared, attention=AttentionConfig(heads=4), parameter_tokens=ParameterTokens(options.width * 3 // 4)
        ),
    }


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """Images [1797, 8, 8, 1] from 0 to 1, and their digits. Raises `UserError` without scikit-learn."""
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise UserError("data", "digits", "scikit-learn, which carries them", "pip install 'lmlab[vision]'") from error
    found = load()
    return found.images[..., None].astype(np.float32) / 16, found.target.astype(np.int32)


def classify(classifier: Classifier) -> Objective:
    """Cross-entropy of (images_BHWC, labels_B)."""

    def objective(params: Params, batch: Batch, key: Key) -> Terms:
        del key
        images_BHWC, labels_B = batch
        logprobs_BV = jax.nn.log_softmax(classifier.logits(params, images_BHWC))
        losses_B = -jnp.take_along_axis(logprobs_BV, labels_B[:, None], axis=1)[:, 0]
        count = jnp.asarray(len(labels_B), jnp.float32)
        return Terms({"nll": Ratio(jnp.sum(losses_B), count)}, {"nll": 1.0}, {})

    return objective


def train(config: ModelConfig, data: tuple[np.ndarray, np.ndarray], options: Options) -> dict[str, Any]:
    """Held-out accuracy of every seed along the way."""
    order = np.random.default_rng(0).permutation(len(data[0]))
    held_out, train_set = (
        [part[rows] for part in data] for rows in (order[: len(order) // 5], order[len(order) // 5 :])
    )
    classifier = image_classifier(language_model(config), data[0].shape[1:], PATCH)
    # All are matrices to Adam; the axes would only matter to Muon.
    shapes = jax.eval_shape(classifier.init, jax.random.key(0))
    schedule = ScheduleConfig(peak=options.peak)
    tx = build_optimizer(OptimConfig(schedule=schedule, weight_decay=0.05), _no_names(shapes), options.steps)
    step = make_step(classify(classifier), tx)
    keys = jax.random.split(jax.random.key(0), options.seeds)
    states = jax.jit(jax.vmap(lambda key: new_state(classifier.init(key), tx, key)))(keys)
    advance = jax.jit(
        lambda states, batches: jax.lax.scan(lambda s, b: jax.vmap(step)(s, b), states, batches), donate_argnums=0
    )
    images, labels = map(jnp.asarray, held_out)

    def right(params: Params) -> Array:
        return jnp.mean(jnp.argmax(classifier.logits(params, images), axis=-1) == labels)

    measure = jax.jit(jax.vmap(right))
    curve, draws = {}, [np.random.default_rng(seed + 1) for seed in range(options.seeds)]
    chunk = max(1, options.steps // 20)
    for first in range(0, options.steps, chunk):
        shape = (min(chunk, options.steps - first), options.batch)
        rows = np.stack([draw.integers(0, len(train_set[0]), shape) for draw in draws], axis=1)
        states, _ = advance(states, tuple(part[rows] for part in train_set))
        curve[first + shape[0]] = np.asarray(measure(states.params)).tolist()
    return {"parameters": sum(leaf.size for leaf in jax.tree.leaves(shapes)), "accuracy": curve}


def _no_names(shapes: Any) -> Any:
    return jax.tree.map(lambda leaf: ("",) * leaf.ndim, shapes)


def draw(result: dict[str, Any], path: Path) -> None:
    """Accuracy by step."""
    with drawing(path, 6, 3.2) as drawn:
        axes = drawn.add_subplot()
        for name, found in result["models"].items():
            values = list(found["accuracy"].values())
            label = f"{name}, {found['parameters']:,} parameters"
            axes.errorbar(list(found["accuracy"]), np.mean(values, axis=1), [deviation(x) for x in values], label=label,
                          capsize=2)  # fmt: skip
        axes.set(xlabel="steps", ylabel="held-out accuracy")
        axes.legend(fontsize=8)


def experiment(options: Options) -> int:
    """Run, write, print."""
    from lmlab.core.runtime import prepare

    if options.smoke:
        options = replace(options, seeds=2, steps=4, width=16, layers=1)
    prepare()
    data = load_digits()
    result: dict[str, Any] = {"options": asdict(options), "models": {}}
    for name, config in models(options).items():
        result["models"][name] = found = train(config, data, options)
        last = found["accuracy"][options.steps]
        print(f"{name:12s} {found['parameters']:,} parameters, held-out accuracy {100 * np.mean(last):.2f} % "
              f"±{100 * deviation(last):.2f} over {options.seeds} seeds", flush=True)  # fmt: skip
    draw(result, keep(result, options.out) / "digits.svg")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code, as `lmlab` does."""
    return exit_code(lambda: experiment(tyro.cli(Options, args=argv)), "python -m experiments.tokenformer_digits")


if __name__ == "__main__":
    sys.exit(main())
