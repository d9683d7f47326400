"""Checkpoints beside `numpy.savez` of the same arrays: `python -m benchmarks.checkpoint`.

Training states under AdamW (parameters and two moments, float32 noise that no codec shrinks) of 10M and 50M
parameters. "save, blocking" is what the train loop waits for: digests and copies; "save, total" ends when the
checkpoint is whole in its folder. "restore" reads the newest checkpoint and verifies it; "verify" is the digests alone,
which both save and restore contain. The yardstick writes one .npz and loads every array of it back, without digests or
atomicity. Rounds take turns, each in a fresh folder; the first is not counted. Neither side asks the disk to be in
step (fsync), and what was just written is read from the page cache: this times the programs, not the disk; --folder
chooses the file system. Prints seconds (medians) and MB/s, and as its last line one JSON object.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from benchmarks.timing import median_ratio
from lmlab.core.errors import UserError, check
from lmlab.core.runtime import prepare
from lmlab.models.config import AttentionConfig, TransformerConfig
from lmlab.models.transformer import transformer
from lmlab.train.checkpoint import digests, finish, open_checkpoints, restore, save, shapes
from lmlab.train.state import State, init_state

SIZES = {"10M": (7, 320), "50M": (12, 576)}
"""Layers and width of the Llama (vocabulary 4096, tied) with about so many parameters."""


def make_state(layers: int, width: int, seed: int) -> State:
    """A state in which every float holds noise, moments too: fresh ones are zeros, which compress to nothing."""
    config = TransformerConfig(vocab_size=4096, layers=layers, width=width, attention=AttentionConfig(heads=4))
    state = init_state(transformer(config).init, optax.adamw(1e-3), seed)
    rng = np.random.default_rng(seed)

    def noise(leaf: Any) -> Any:
        is_float = jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating)
        return jax.numpy.asarray(rng.standard_normal(leaf.shape, np.float32)) if is_float else leaf

    return jax.block_until_ready(jax.tree.map(noise, state))


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """What `run` returns, and the seconds until its arrays are there."""
    began = time.perf_counter()
    result = jax.block_until_ready(run())
    return result, time.perf_counter() - began


def lmlab_round(state: State, folder: Path) -> dict[str, float]:
    """Seconds of one save, restore and verification."""
    writer = open_checkpoints(folder)
    _, blocking = timed(lambda: save(writer, state, {}))
    _, rest = timed(lambda: finish(writer))
    reader = open_checkpoints(folder)
    restored, reading = timed(lambda: restore(reader, state))
    finish(reader)
    found, verifying = timed(lambda: digests(restored))
    if found != digests(state):
        raise RuntimeError("what was restored is not what was saved")
    return {"save, blocking": blocking, "save, total": blocking + rest, "restore": reading, "verify": verifying}


def numpy_round(state: State, path: Path) -> dict[str, float]:
    """Seconds of writing and of reading one file with numpy."""
    plain = State(state.step, state.params, state.opt_state, jax.random.key_data(state.key))
    names, leaves = list(shapes(plain)), jax.tree.leaves(plain)

    def write() -> None:
        np.savez(path, **{name: np.asarray(leaf) for name, leaf in zip(names, leaves, strict=True)})

    def read() -> list[jax.Array]:
        with np.load(path) as file:
            return [jax.numpy.asarray(file[name]) for name in names]

    _, writing = timed(write)
    found, reading = timed(read)
    if not all(np.array_equal(a, b) for a, b in zip(found, leaves, strict=True)):
        raise RuntimeError("what numpy read is not what was saved")
    return {"numpy, save": writing, "numpy, load": reading}


def measure(state: State, rounds: int, folder: Path | None) -> dict[str, list[float]]:
    """Seconds by operation of every counted round."""
    seconds: dict[str, list[float]] = {}
    for number in range(rounds + 1):
        with tempfile.TemporaryDirectory(prefix="lmlab-checkpoint-", dir=folder) as here:
            new = lmlab_round(state, Path(here) / "lmlab") | numpy_round(state, Path(here) / "numpy.npz")
        if number > 0:
            for name, value in new.items():
                seconds.setdefault(name, []).append(value)
    return seconds


def report(size: str, bytes_in_all: int, seconds: dict[str, list[float]]) -> dict[str, float]:
    """Print the rows of one size; its part of the JSON."""
    result = {}
    for name, values in seconds.items():
        median = statistics.median(values)
        speed = bytes_in_all / median / 1e6
        yardstick = seconds["numpy, save" if "save" in name else "numpy, load"]
        ratio = f"{median_ratio(values, yardstick):6.2f}x" if name != "verify" else ""
        print(f"{size:6s} {name:16s} {median:8.3f} {min(values):8.3f} {speed:8.0f} {ratio}", flush=True)
        key = name.replace(", ", "_")
        result |= {f"{key}_s": round(median, 4), f"{key}_mb_s": round(speed)}
    return result


def main(argv: list[str] | None = None) -> int:
    """Measure every size."""
    prepare(compile_cache=False)
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES, metavar="SIZE")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's folder for such files)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        check(args.rounds >= 1, "--rounds", args.rounds, "at least 1")
        check(args.folder is None or args.folder.is_dir(), "--folder", str(args.folder), "a folder that exists")
    except UserError as error:
        print(f"checkpoint: {error}", file=sys.stderr)
        return 2
    print(f"{'':23s} {'median s':>8s} {'best s':>8s} {'MB/s':>8s}   time / numpy's")
    result = {}
    for size in args.sizes:
        state = make_state(*SIZES[size], args.seed)
        parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        bytes_in_all = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        print(f"{size:6s} {parameters:,} parameters, a state of {bytes_in_all / 1e6:,.0f} MB")
        result[size] = report(size, bytes_in_all, measure(state, args.rounds, args.folder))
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
