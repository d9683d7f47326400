"""Attention back-ends beside `jax.nn.dot_product_attention`: `python -m benchmarks.attention`.

Grouped heads (8 queries to 2 keys, of size 64) under a causal mask, over rows that are one document and rows packed
with four; as many rows as make 4096 tokens. Every back-end of `lmlab.models.attention` that can run here takes
turns with the peer, which gets `is_causal` and, where rows are packed, a dense mask of segments that is made inside
the timing, as a program that trains on packed rows makes it; on a GPU with 16 bits it is cuDNN's kernel. The outputs
and gradients of every arm are compared before they are timed. "auto" is named with the back-end that it picks.
Prints milliseconds (medians), the peer's time over the arm's (above 1: faster than the peer) and the bytes of
temporaries of the compiled program; as its last line one JSON object about auto, which holds for forward and backward
together (`ratio_LENGTH`, `ratio_packed_LENGTH`: peer's time / ours) and the same of bytes (`bytes_ratio_...`).
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.timing import median_ratio, relative_error, take_turns
from lmlab.core.errors import UserError, check
from lmlab.core.masking import self_attention_mask
from lmlab.core.runtime import prepare
from lmlab.core.types import Array
from lmlab.models.attention import BACKENDS, attention

HEADS, KV_HEADS, DOCUMENTS = 8, 2, 4
PEER = "jax.nn"
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}
"""Largest relative error of an arm against the float32 reference."""

Attend = Callable[..., Array]
"""`attend(q_BTNH, k_BTKH, v_BTKH, positions_BT, segments_BT or None) -> out_BTNH`."""


@dataclass(frozen=True)
class Case:
    """One shape of rows."""

    length: int
    packed: bool
    batch: int
    head_size: int
    dtype: str

    def inputs(self, seed: int) -> tuple[Array, ...]:
        """q_BTNH, k_BTKH, v_BTKH, a cotangent of the output, positions_BT and, where packed, segments_BT."""
        keys = jax.random.split(jax.random.key(seed), 4)
        draw = lambda key, heads: jax.random.normal(key, (self.batch, self.length, heads, self.head_size), self.dtype)
        arrays = [draw(key, heads) for key, heads in zip(keys, (HEADS, KV_HEADS, KV_HEADS, HEADS), strict=True)]
        place_BT = jnp.broadcast_to(jnp.arange(self.length, dtype=jnp.int32), (self.batch, self.length))
        if not self.packed:
            return (*arrays, place_BT)
        document = -(-self.length // DOCUMENTS)
        return (*arrays, place_BT % document, place_BT // document + 1)


def lmlab_attention(backend: str) -> Attend:
    """One back-end of lmlab."""

    def attend(q: Array, k: Array, v: Array, positions_BT: Array, segments_BT: Array | None = None) -> Array:
        return attention(q, k, v, self_attention_mask(positions_BT, segments_BT), backend)

    return attend


def peer_attention(implementation: str) -> Attend:
    """JAX's own function."""

    def attend(q: Array, k: Array, v: Array, positions_BT: Array, segments_BT: Array | None = None) -> Array:
        del positions_BT
        same_B1TT = None if segments_BT is None else (segments_BT[:, :, None] == segments_BT[:, None, :])[:, None]
        return jax.nn.dot_product_attention(q, k, v, mask=same_B1TT, is_causal=True, implementation=implementation)

    return attend


def passes(attend: Attend) -> dict[str, Callable[..., Any]]:
    """The output alone, and the gradient of <output, cotangent> in q, k and v."""

    def forward(q: Array, k: Array, v: Array, cotangent: Array, *rest: Array) -> Array:
        del cotangent
        return attend(q, k, v, *rest)

    def score(q: Array, k: Array, v: Array, cotangent: Array, *rest: Array) -> Array:
        return jnp.sum(attend(q, k, v, *rest).astype(jnp.float32) * cotangent)

    return {"forward": forward, "both": jax.grad(score, argnums=(0, 1, 2))}


def compile_arms(case: Case, inputs: tuple[Array, ...]) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Compiled passes by arm, auto first and the peer second; and why a back-end is left out."""
    lower = lambda attend: {name: jax.jit(run).lower(*inputs) for name, run in passes(attend).items()}
    lowered, refused = {}, {}
    for backend in ("auto", *BACKENDS):
        try:
            lowered[backend] = lower(lmlab_attention(backend))
        except UserError as error:
            refused[backend] = error.expected
    # The same program under another name needs no timing of its own.
    texts = {name: arm["both"].as_text() for name, arm in lowered.items()}
    (chosen,) = [name for name, text in texts.items() if name != "auto" and text == texts["auto"]]
    fused = jax.default_backend() == "gpu" and case.dtype != "float32"
    arms = {f"auto ({chosen})": lowered["auto"], PEER: lower(peer_attention("cudnn" if fused else "xla"))}
    arms |= {name: arm for name, arm in lowered.items() if name not in ("auto", chosen)}
    return {name: {part: x.compile() for part, x in arm.items()} for name, arm in arms.items()}, refused


def check_arms(case: Case, arms: dict[str, dict[str, Any]], inputs: tuple[Array, ...]) -> None:
    """Raise `RuntimeError` where an arm computes something else than the reference does."""
    for part, reference in passes(lmlab_attention("reference")).items():
        wanted = jax.jit(reference)(*inputs)
        for name, arm in arms.items():
            error = relative_error(arm[part](*inputs), wanted)
            if not error < TOLERANCE[case.dtype]:
                raise RuntimeError(f"{name}, {part}, {case}: differs from the reference by {error:.1e}")


def measure(case: Case, rounds: int, seed: int) -> tuple[dict[str, float], dict[str, str]]:
    """Print the rows of one case; its part of the JSON, and why a back-end is left out."""
    inputs = case.inputs(seed)
    arms, refused = compile_arms(case, inputs)
    check_arms(case, arms, inputs)
    kind = "packed" if case.packed else "causal"
    result = {}
    seconds = {part: take_turns({name: partial(arm[part], *inputs) for name, arm in arms.items()}, rounds)
               for part in ("forward", "both")}  # fmt: skip
    for name, arm in arms.items():
        cells = ""
        for part, times in seconds.items():
            ratio, size = median_ratio(times[PEER], times[name]), temporary_bytes(arm[part])
            cells += f" {1e3 * statistics.median(times[name]):10.1f} {ratio:6.2f}x {size / 2**20:9.1f}"
            if part == "both" and name.startswith("auto"):
                suffix = f"{'packed_' if case.packed else ''}{case.length}"
                result[f"ratio_{suffix}"] = round(ratio, 3)
                result[f"bytes_ratio_{suffix}"] = round(temporary_bytes(arms[PEER][part]) / max(size, 1), 3)
        print(f"{case.batch:3d} x {case.length:<5d} {kind:7s} {name:16s}{cells}", flush=True)
    return result, refused


def temporary_bytes(compiled: Any) -> int:
    """Peak of the memory that a compiled program takes beside its inputs and outputs."""
    return compiled.memory_analysis().temp_size_in_bytes


def main(argv: list[str] | None = None) -> int:
    """Measure every length, alone and packed."""
    prepare(compile_cache=False)
    default = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 2048])
    parser.add_argument("--tokens", type=int, default=4096, help="rows x length")
    parser.add_argument("--head-size", type=int, default=64, help="splash needs a multiple of 128")
    parser.add_argument("--dtype", choices=list(TOLERANCE), default=default)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        for length in args.lengths:
            check(1 <= length <= args.tokens, "--lengths", length, f"from 1 to --tokens = {args.tokens}")
        check(args.rounds >= 1, "--rounds", args.rounds, "at least 1")
    except UserError as error:
        print(f"attention: {error}", file=sys.stderr)
        return 2
    print(f"{jax.devices()[0].device_kind}, {args.dtype}; {HEADS} heads, {KV_HEADS} of keys, size {args.head_size}")
    print(f"{'':34s} {'forward, ms':>10s} {'':>7s} {'temp MiB':>8s} {'+ backward':>10s} {'':>7s} {'temp MiB':>9s}")
    result, refused = {}, {}
    for length in args.lengths:
        for packed in (False, True):
            case = Case(length, packed, args.tokens // length, args.head_size, args.dtype)
            numbers, reasons = measure(case, args.rounds, args.seed)
            result |= numbers
            refused |= reasons
    for name, reason in refused.items():
        print(f"{name} is left out: it needs {reason}")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
