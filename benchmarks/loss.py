"""Chunked cross-entropy beside full logits under optax's loss: `python -m benchmarks.loss`.

Value and gradient, in the hidden states and the unembedding, of `lmlab.objectives.cross_entropy` at several chunk
sizes (places of a row whose logits are held at once), and of the naive form: the same model's logits of all places,
`optax.softmax_cross_entropy_with_integer_labels`, a weighted sum. 4 rows of 256 places, width 256, float32. The arms'
values and gradients are compared before they are timed. Prints milliseconds (medians of turns), the naive time over
the arm's (above 1: faster than naive) and the bytes of temporaries of the compiled programs; as its last line one
JSON object: `ratio_VOCABULARY_CHUNK` naive time / ours, `bytes_ratio_...` naive bytes / ours.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax

from benchmarks.timing import median_ratio, relative_error, take_turns
from lmlab.core.errors import UserError, check
from lmlab.core.runtime import prepare
from lmlab.core.types import Array, Params
from lmlab.models.config import AttentionConfig, TransformerConfig
from lmlab.models.transformer import transformer
from lmlab.objectives.cross_entropy import Logits, chunked_cross_entropy

TOLERANCE = 1e-4
"""Largest relative error of a chunked value or gradient against the naive one, in float32."""

Loss = Callable[[Params, Array, Array, Array], Array]
"""`loss(head, hidden_BTD, labels_BT, weights_BT) -> []`."""


def naive(logits: Logits) -> Loss:
    """The form that holds [B, T, V]."""

    def loss(head: Params, hidden_BTD: Array, labels_BT: Array, weights_BT: Array) -> Array:
        nll_BT = optax.softmax_cross_entropy_with_integer_labels(logits(head, hidden_BTD), labels_BT)
        return jnp.sum(weights_BT * nll_BT)

    return loss


def chunked(logits: Logits, chunk: int) -> Loss:
    """Lmlab's form."""

    def loss(head: Params, hidden_BTD: Array, labels_BT: Array, weights_BT: Array) -> Array:
        return chunked_cross_entropy(logits, head, hidden_BTD, labels_BT, weights_BT, 0.0, chunk).loss

    return loss


def inputs(vocab: int, width: int, rows: int, length: int, seed: int) -> tuple[Params, Array, Array, Array]:
    """A head, hidden states as a final norm gives them, labels, and weights of which one in ten is 0."""
    keys = jax.random.split(jax.random.key(seed), 4)
    head = {"embedding": 0.02 * jax.random.normal(keys[0], (vocab, width))}
    hidden_BTD = jax.random.normal(keys[1], (rows, length, width))
    labels_BT = jax.random.randint(keys[2], (rows, length), 0, vocab)
    return head, hidden_BTD, labels_BT, jax.random.bernoulli(keys[3], 0.9, (rows, length)).astype(jnp.float32)


def measure(vocab: int, args: argparse.Namespace) -> dict[str, float]:
    """Print the rows of one vocabulary; its part of the JSON."""
    config = TransformerConfig(vocab_size=vocab, layers=1, width=args.width, attention=AttentionConfig(heads=1))
    logits = transformer(config).logits
    arrays = inputs(vocab, args.width, args.rows, args.length, args.seed)
    losses = {"naive": naive(logits)} | {f"chunk {chunk}": chunked(logits, chunk) for chunk in args.chunks}
    arms = {
        name: jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*arrays).compile()
        for name, loss in losses.items()
    }
    wanted = arms["naive"](*arrays)
    for name, arm in arms.items():
        error = relative_error(arm(*arrays), wanted)
        if not error < TOLERANCE:
            raise RuntimeError(f"{name} of {vocab}: differs from the naive form by {error:.1e}")
    del wanted
    times = take_turns({name: partial(arm, *arrays) for name, arm in arms.items()}, args.rounds)
    sizes = {name: arm.memory_analysis().temp_size_in_bytes for name, arm in arms.items()}
    result = {}
    for name in arms:
        ratio, saved = median_ratio(times["naive"], times[name]), sizes["naive"] / max(sizes[name], 1)
        print(f"{vocab:10d} {name:12s} {1e3 * statistics.median(times[name]):8.1f} {ratio:7.2f}x"
              f" {sizes[name] / 2**20:10.1f} {saved:7.2f}x", flush=True)  # fmt: skip
        if name != "naive":
            suffix = f"{vocab}_{name.removeprefix('chunk ')}"
            result |= {f"ratio_{suffix}": round(ratio, 3), f"bytes_ratio_{suffix}": round(saved, 3)}
    return result


def main(argv: list[str] | None = None) -> int:
    """Measure every vocabulary."""
    prepare(compile_cache=False)
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[4096, 32768, 131072])
    parser.add_argument("--chunks", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        for name in ("rows", "length", "width", "rounds"):
            check(getattr(args, name) >= 1, f"--{name}", getattr(args, name), "at least 1")
        for name in ("vocabularies", "chunks"):
            check(min(getattr(args, name)) >= 1, f"--{name}", getattr(args, name), "sizes of at least 1")
    except UserError as error:
        print(f"loss: {error}", file=sys.stderr)
        return 2
    print(f"{jax.devices()[0].device_kind}, float32; {args.rows} x {args.length} places, width {args.width}")
    print(f"{'vocabulary':>10s} {'':12s} {'ms':>8s} {'naive /':>8s} {'temp MiB':>10s} {'naive /':>8s}")
    result: dict[str, float] = {}
    for vocab in args.vocabularies:
        result |= measure(vocab, args)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
