"""Plans and shardings as text."""

import math
from collections.abc import Mapping
from typing import Any

from lmlab.plan.compiled import Compiled
from lmlab.plan.memory import Memory, parts_of
from lmlab.plan.speed import Speed
from lmlab.recipe import Pretrain
from lmlab.train.device import Chip
from lmlab.train.parallel import Placed

TIGHT, TIGHT_ESTIMATE = 0.95, 0.7
"""Share of a chip's memory above which a plan is called tight, by what the compiler or the estimate says of it:
compilers lay buffers out with holes, and runtimes keep some memory for themselves."""


def gib(size: float) -> str:
    """Bytes in a unit that leaves few digits."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 2**power:
            return f"{size / 2**power:.2f} {unit}"
    return f"{size:.0f} B"


def seconds(time: float) -> str:
    """A time in a unit that leaves few digits."""
    return f"{time:.2f} s" if time >= 1 else f"{time * 1e3:.1f} ms"


def memory_lines(memory: Memory, compiled: Compiled | None, chip: Chip, name: str) -> list[str]:
    """Bytes of one device, and whether they fit."""
    lines = ["memory of one device, estimated"]
    lines += [f"  {part:22s} {gib(size):>12s}" for part, size in vars(memory).items()]
    lines.append(f"  {'total':22s} {gib(memory.total):>12s}")
    if compiled and compiled.refusal:
        lines.append(f"the compiler for {compiled.compiler} refuses: {compiled.refusal}")
    elif compiled:
        lines += [
            f"memory of one device, as compiled for {compiled.compiler}",
            f"  {'arguments':22s} {gib(compiled.arguments):>12s}",
            f"  {'results besides':22s} {gib(compiled.results):>12s}",
            f"  {'temporaries':22s} {gib(compiled.temporaries):>12s}",
            f"  {'total':22s} {gib(compiled.total):>12s}",
        ]
        if compiled.compiler == "cpu":
            lines.append("  (for a CPU: attention scores are held, and bfloat16 is widened. A TPU or GPU needs less.)")
    trusted = compiled and compiled.compiler != "cpu" and not compiled.refusal
    total = compiled.total if compiled and trusted else memory.total
    share = total / chip.memory
    tight = TIGHT if trusted else TIGHT_ESTIMATE
    verdict = "DOES NOT FIT" if share > 1 or (compiled and compiled.refusal) else "tight" if share > tight else "fits"
    if not trusted:
        lines.append("(an estimate of what is alive at once; compilers took 0.6 to 1.4 times that where tried)")
    return [*lines, f"{verdict}: {gib(total)} of the {gib(chip.memory)} of a {name} ({share:.0%})"]


def advice(memory: Memory, config: Pretrain, shape: Mapping[str, int]) -> list[str]:
    """What to change where a plan does not fit, the most useful first."""
    state = memory.parameters + memory.optimizer + memory.gradients
    rows = config.data.batch_size // (shape["data"] * shape["fsdp"] * config.train.microbatches)
    more = config.train.microbatches * 2
    ways = [(state, "more fsdp: parameters, moments and gradients are divided by it")]
    size = memory.activations + memory.working
    if rows > 1:
        ways.append((size, f"--train.microbatches {more}: {rows // 2} instead of {rows} rows at once"))
    else:
        ways.append((size, "more tensor or context: one row is already all that a device holds at once"))
    remat = {"none": "dots", "dots": "full"}.get(config.model.execution.remat)
    if remat:
        ways.append((memory.activations, f"--model.execution.remat {remat}: layers keep less and compute it again"))
    ways.append((memory.logits, f"--objective.chunk {max(config.objective.chunk // 2, 1)}: fewer logits at once"))
    return ["what to change:"] + [
        f"  {text}" for size, text in sorted(ways, reverse=True) if size > 0.05 * memory.total
    ]


def collective_lines(compiled: Compiled) -> list[str]:
    """What the compiled program sends."""
    if not compiled.collectives:
        return []
    lines = [f"collectives of a step, as compiled for {compiled.compiler}"]
    return lines + [f"  {kind:22s} {n:6d} x, {gib(size)} in all" for kind, (n, size) in compiled.collectives.items()]


def speed_lines(speed: Speed, mfu: float, devices: int) -> list[str]:
    """Operations, and where the time of a step goes."""
    rate = lambda time: f"{speed.tokens / time:,.0f} tokens/s, {speed.tokens / time / devices:,.0f} a device"
    lines = [
        f"operations  {speed.flops_per_token:.3g} FLOPs per token, {speed.tokens:,} tokens per step",
        "time of a step, estimated",
        f"  {'matmuls at the peak':26s} {seconds(speed.at_peak):>10s}",
        f"  {f'computing at {mfu:.0%} MFU':26s} {seconds(speed.at_mfu):>10s}   (assumed: --mfu)",
        f"  {'memory traffic, at least':26s} {seconds(speed.memory):>10s}",
    ]
    lines += [f"  {f'collectives over {axis}':26s} {seconds(time):>10s}" for axis, time in speed.links.items()]
    lines.append(f"  {'if collectives overlap':26s} {seconds(speed.slowest):>10s}   {rate(speed.slowest)}")
    if speed.links:
        lines.append(f"  {'if they do not':26s} {seconds(speed.added):>10s}   {rate(speed.added)}")
    return [*lines, "  (published peaks and link rates, rings, no latency; a network between slices is not counted)"]


def sharding_lines(table: list[Placed], mesh: Any, widths: Mapping[str, int]) -> list[str]:
    """The table of parameter shardings. widths: bytes of an element by path."""
    rows = [("parameter", "shape", "axes", "spec", "bytes on a device")]
    total = 0.0
    for placed in table:
        size = math.prod(placed.shape) * widths[placed.path] / parts_of(placed, mesh)
        total += size
        spec = ", ".join("-" if entry is None else str(entry) for entry in placed.spec)
        rows.append((placed.path, "x".join(map(str, placed.shape)), " ".join(placed.names), f"({spec})", gib(size)))
    wide = [max(len(row[column]) for row in rows) for column in range(4)]
    text = ["  ".join([*(f"{cell:{w}s}" for cell, w in zip(row, wide, strict=False)), row[4]]) for row in rows]
    return [*text, f"all parameters: {gib(total)} on a device"]
