"""The real train step, compiled ahead of time for devices that are not there, in a process of its own.

    python -m lmlab.plan.compiled < request.json

With libtpu, the TPU compiler makes the program that a TPU would run; else the CPU's compiler makes one for as many
pretended devices. Nothing is computed.
"""

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

from lmlab.core.errors import UserError
from lmlab.core.serialize import from_json, to_json
from lmlab.recipe import Pretrain

TORUS = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2}
"""Dimensions of the network of a slice."""
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
SIZES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "s8": 1, "u8": 1, "pred": 1, "f64": 8, "s64": 8, "u64": 8}


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of the program of one device, in bytes."""

    compiler: str
    arguments: float
    results: float
    """Those that do not take over the memory of an argument."""
    temporaries: float
    collectives: dict[str, tuple[int, float]]
    """By kind: how often in a step, and bytes of their results in all."""
    refusal: str = ""
    """What the compiler says if the program does not fit the chip; all else is then 0."""

    @property
    def total(self) -> float:
        """Memory of the step."""
        return self.arguments + self.results + self.temporaries


def topology(chip: str, devices: int) -> str | None:
    """The name of a slice of that many chips, as square as it can be; None where there is none."""
    dimensions, smallest = TORUS[chip], (2, 2, 1)
    if devices < 4 or devices & (devices - 1):
        return None
    sides = [1] * dimensions
    for _ in range(int(math.log2(devices))):
        sides[sides.index(min(sides))] *= 2
    sides.sort(reverse=dimensions == 3)
    fits = all(side % least == 0 for side, least in zip(sides, smallest, strict=False))
    return f"{chip}:{'x'.join(map(str, sides))}" if fits else None


def found_compiler(compiler: str, chip: str, devices: int) -> str:
    """What `auto` stands for: tpu where libtpu is installed and such a slice exists, else none."""
    if compiler != "auto":
        return compiler
    able = chip in TORUS and topology(chip, devices) is not None and find_spec("libtpu") is not None
    return "tpu" if able else "none"


def compile_apart(config: Pretrain, shape: Mapping[str, int], chip: str, compiler: str, timeout: float) -> Compiled:
    """Compile the step of a recipe for a mesh in a fresh process; the caller's devices are left alone.

    compiler: tpu or cpu. Raises `UserError` if it cannot, or if that takes longer than `timeout` seconds.
    """
    devices = math.prod(shape.values())
    if compiler == "tpu" and found_compiler("auto", chip, devices) != "tpu":
        raise UserError("compiler", compiler, "libtpu (pip install libtpu), a TPU, and a slice of 4, 8, 16, ... chips",
                        "Use --compiler cpu, or none for the estimate alone.")  # fmt: skip
    target = topology(chip, devices) if compiler == "tpu" else ""
    # Nothing runs on a TPU: its metadata server is not asked, and its lock is not taken.
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={1 if target else devices}"
    request = json.dumps({"config": to_json(config), "shape": dict(shape), "topology": target})
    command = [sys.executable, "-m", "lmlab.plan.compiled"]
    try:
        done = subprocess.run(
            command, input=request, env=environment, capture_output=True, text=True, check=False, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        raise UserError("compiler", compiler, f"a program that compiles within {timeout:.0f} s",
                        "Use --compiler none for the estimate alone.") from None  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"compiler"')]
    if refused := re.search("RESOURCE_EXHAUSTED: (.*)", done.stderr):
        return Compiled(target or "cpu", 0, 0, 0, {}, refused[1].strip())
    if done.returncode or not lines:
        reasons = [line for line in done.stderr.splitlines() if "rror" in line]
        reason = reasons[-1] if reasons else "no reason given"
        raise UserError("compiler", compiler, "a program that compiles", reason.strip()[:400])
    found = json.loads(lines[-1])
    return Compiled(**found | {"collectives": {k: tuple(v) for k, v in found["collectives"].items()}})


def compile_here(config: Pretrain, shape: Mapping[str, int], topology: str) -> dict[str, Any]:
    """Compile in this process, whose devices must be as many as the mesh has, unless a topology is named."""
    import jax
    from jax.experimental import topologies

    from lmlab.plan.memory import batch_shapes, train_step
    from lmlab.train.parallel import make_mesh, param_shardings, placed_step, state_shardings

    devices = list(topologies.get_topology_desc(topology, platform="tpu").devices) if topology else jax.devices()
    sizes: dict[str, Any] = dict(shape)
    mesh = make_mesh(replace(config.parallel, **sizes), devices)
    # Before the mesh is set: nothing can be computed on devices that are not there, not even a constant.
    lm, state, step = train_step(config)
    with jax.set_mesh(mesh):
        shardings = state_shardings(state, param_shardings(lm.axes, state.params, mesh))
        batch = batch_shapes(config.data.batch_size, config.data.length)
        placed: Any = placed_step(step, shardings)
        program = placed.lower(state, batch).compile()
    memory = program.memory_analysis()
    return {
        "compiler": topology or "cpu",
        "arguments": memory.argument_size_in_bytes,
        "results": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "collectives": collectives(program.as_text()),
    }


def collectives(hlo: str) -> dict[str, tuple[int, float]]:
    """By kind: how often a step runs it, and the bytes of all its results. Turns of loops count.

    Pieces of one that runs beside other work share its channel, and are counted once.
    """
    bodies = dict(_computations(hlo))
    found: dict[tuple[str, str], tuple[int, float]] = {}

    def visit(name: str, times: int) -> None:
        for number, line in enumerate(bodies.get(name, ())):
            if match := re.search(rf"= (.*?) ({'|'.join(COLLECTIVES)})(-start)?\(", line):
                channel = re.search(r"channel_id=\d+", line)
                key = match[2], channel[0] if channel else f"{name} {number}"
                size = _result_bytes(match[1], bool(match[3]))
                found[key] = max(found.get(key, (0, 0.0)), (times, times * size))
            if loop := re.search(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)", line):
                visit(loop[2], times * _turns(line, bodies.get(loop[1], [])))
            for callee in re.findall(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)", line):
                visit(callee, times)

    entry = re.search(r"^ENTRY %?([\w.\-]+)", hlo, re.MULTILINE)
    visit(entry[1] if entry else "", 1)
    kinds = {kind for kind, _ in found}
    rows = {kind: [value for (other, _), value in found.items() if other == kind] for kind in sorted(kinds)}
    return {kind: (sum(n for n, _ in values), sum(size for _, size in values)) for kind, values in rows.items()}


def _turns(line: str, condition: list[str]) -> int:
    """Turns of a loop: what the compiler knows, else the number that its counter is compared with."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', line):
        return int(known[1])
    limits = [int(limit) for text in condition for limit in re.findall(r" constant\((\d+)\)", text)]
    return max(limits, default=1)


def _computations(hlo: str) -> Iterator[tuple[str, list[str]]]:
    name, lines = "", list[str]()
    for line in hlo.splitlines():
        if begins := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            name, lines = begins[1], []
        elif line == "}":
            yield name, lines
        else:
            lines.append(line)


def _result_bytes(types: str, asynchronous: bool) -> float:
    """Bytes of the arrays in a type. Those that start and finish later list operands first, then as many results."""
    sizes = [
        SIZES.get(kind, 4) * math.prod(map(int, filter(None, dims.split(","))))
        for kind, dims in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", types)
    ]
    return float(max(sizes, default=0) if asynchronous else sum(sizes))


def main() -> int:
    """Read a request, print what was found."""
    request = json.loads(sys.stdin.read())
    found = compile_here(from_json(request["config"]), request["shape"], request["topology"])
    sys.stdout.write(json.dumps(found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
