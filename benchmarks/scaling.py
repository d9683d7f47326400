"""What the train step sends between devices, against the least it could: `python -m benchmarks.scaling`.

Compiles the step for 2, 4 and 8 fake devices along each axis of the mesh, reads the collectives off the compiled
program, and counts what a device sends if they run as rings (arXiv 1910.02054, section 7.1). Nothing is run, so the
numbers are exact and the same on every machine. The least, with n devices and P parameters in float32:

- data: the gradient added up once, 2 (n - 1) / n P;
- fsdp: every matrix gathered for the forward and for the backward pass and its gradient scattered, 3 (n - 1) / n P;
  what is too small to be divided is added up as above;
- tensor: four sums of activations a layer (arXiv 1909.08053, section 3), one for the embedding, and one for the
  gradient of the logits, 2 (n - 1) / n [B, T, D] each.

Prints a table, and as its last line one JSON object: the ratios at 8 devices.
"""

import json
import math
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

DEVICES = 8
BATCH, LENGTH = 16, 256
SIZES: dict[str, Any] = {"vocab_size": 4096, "layers": 8, "width": 512, "max_length": LENGTH}
HEADS, FFN = 8, 1408

COLLECTIVE = re.compile(
    r"= (?P<result>\(?[^=]*?) (?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)
ARRAY = re.compile(r"(?P<type>pred|bf16|[sufc]\d+)\[(?P<shape>[\d,]*)\]")
CALLED = re.compile(r"(?:body|calls|to_apply|condition)=%?([\w.-]+)")
TRIPS = re.compile(r'known_trip_count"?:\{"n":"(\d+)"')


def computations(hlo: str) -> tuple[str, dict[str, list[str]]]:
    """Name of the entry, and the lines of each computation by name."""
    found: dict[str, list[str]] = {}
    entry = name = ""
    # Long tuples count their members in comments.
    for line in re.sub(r"/\*.*?\*/", "", hlo).splitlines():
        head = re.match(r"(ENTRY )?%?([\w.-]+) \(.*-> .*\{$", line)
        if head:
            name = head[2]
            entry = name if head[1] else entry
            found[name] = []
        elif name:
            found[name].append(line)
    return entry, found


def collectives(hlo: str) -> Iterator[tuple[str, int, int, int]]:
    """(kind, bytes of the result, devices of a group, times it runs) of every collective of a program."""
    entry, lines = computations(hlo)

    def visit(name: str, times: int) -> Iterator[tuple[str, int, int, int]]:
        for line in lines.get(name, []):
            found = COLLECTIVE.search(line)
            if found:
                yield found["kind"], bytes_of(found["result"]), group_size(line), times
                continue
            trips = TRIPS.search(line)
            for called in CALLED.findall(line):
                yield from visit(called, times * (int(trips[1]) if trips and f"body=%{called}" in line else 1))

    return visit(entry, 1)


def bytes_of(result: str) -> int:
    """Bytes of an array or of a tuple of arrays, as HLO writes their types."""
    sizes = {"pred": 1}
    return sum(
        (sizes.get(found["type"]) or int(re.sub(r"\D", "", found["type"])) // 8)
        * math.prod(int(size) for size in found["shape"].split(",") if size)
        for found in ARRAY.finditer(result)
    )


def group_size(line: str) -> int:
    """Devices that take part in one group of a collective. Raises `ValueError` on groups written in no known way."""
    if "source_target_pairs=" in line:
        return 2
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    if listed:
        return len(listed[1].split(","))
    counted = re.search(r"replica_groups=\[\d+,(\d+)\]", line)
    if counted:
        return int(counted[1])
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line)
    if not mesh:
        raise ValueError(line)
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))


def sent(kind: str, size: int, group: int) -> float:
    """Bytes that a device sends for a collective with a result of `size` bytes, as a ring of `group` devices."""
    share = (group - 1) / group
    factor = {
        "all-reduce": 2 * share, "all-gather": share, "all-to-all": share, "reduce-scatter": group - 1,
        "collective-permute": 1,
    }[kind]  # fmt: skip
    return factor * size


def program(axis: str, devices: int) -> tuple[str, dict[str, float]]:
    """The compiled step on a mesh of one axis, and the least bytes by axis."""
    import jax
    import jax.numpy as jnp

    from lmlab.core.sharding import STORED
    from lmlab.core.types import TokenBatch
    from lmlab.models.config import AttentionConfig, MLPConfig, TransformerConfig
    from lmlab.models.transformer import transformer
    from lmlab.objectives.next_token import next_token
    from lmlab.optim.chain import build_optimizer
    from lmlab.optim.config import OptimConfig
    from lmlab.train import parallel
    from lmlab.train.config import ParallelConfig
    from lmlab.train.step import make_step

    config = TransformerConfig(**SIZES, attention=AttentionConfig(heads=HEADS), mlp=MLPConfig(width=FFN))
    lm = transformer(config)
    tx = build_optimizer(OptimConfig(), lm.axes, 100)
    sizes = {"data": 1, "fsdp": 1, "tensor": 1, axis: devices}
    mesh = parallel.make_mesh(ParallelConfig(**sizes))
    shapes = parallel.abstract_state(lm.init, tx)
    table = parallel.placements(lm.axes, shapes.params, mesh)
    shardings = parallel.state_shardings(shapes, parallel.param_shardings(lm.axes, shapes.params, mesh))
    kinds = (jnp.int32, jnp.int32, jnp.int32, jnp.bool_)
    batch = TokenBatch(*(jax.ShapeDtypeStruct((BATCH, LENGTH + 1), kind) for kind in kinds))
    with jax.set_mesh(mesh):
        compiled = parallel.placed_step(make_step(next_token(lm), tx), shardings).lower(shapes, batch).compile()
    share = (devices - 1) / devices
    stored = sum(4 * math.prod(row.shape) for row in table if any(STORED.get(name) == "fsdp" for name in row.names))
    whole = sum(4 * math.prod(row.shape) for row in table) - stored
    activations = 4 * BATCH * LENGTH * config.width
    return compiled.as_text(), {
        "data": 2 * share * (stored + whole),
        "fsdp": share * (3 * stored + 2 * whole),
        "tensor": 2 * share * activations * (4 * config.layers + 2),
    }


def main() -> int:
    """Count for every axis and number of devices."""
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
    os.environ["JAX_PLATFORMS"] = "cpu"
    ratios: dict[str, float] = {}
    print(f"{'axis':8s} {'devices':>7s} {'MB sent':>9s} {'least':>9s} {'ratio':>6s}  MB by kind, and how many")
    for axis in ("data", "fsdp", "tensor"):
        for devices in (2, 4, DEVICES):
            hlo, least = program(axis, devices)
            kinds: dict[str, tuple[float, int]] = {}
            for kind, size, group, times in collectives(hlo):
                total, count = kinds.get(kind, (0.0, 0))
                kinds[kind] = total + times * sent(kind, size, group), count + times * (group > 1)
            moved = sum(total for total, _ in kinds.values())
            ratios[axis] = moved / least[axis]
            shown = ", ".join(f"{kind} {total / 1e6:.1f} ({count})" for kind, (total, count) in kinds.items())
            print(f"{axis:8s} {devices:7d} {moved / 1e6:9.2f} {least[axis] / 1e6:9.2f} {ratios[axis]:6.3f}  {shown}")
    print(json.dumps({axis: round(ratio, 3) for axis, ratio in ratios.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
