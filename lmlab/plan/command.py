"""The plan of a recipe on a mesh of chips, put together."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from lmlab.core.errors import check
from lmlab.core.sharding import MESH_AXES
from lmlab.data.config import Bytes, TokenizerFile, TrainedBPE
from lmlab.optim.groups import path_name
from lmlab.plan.compiled import compile_apart, found_compiler
from lmlab.plan.memory import mesh_for, predict, table_of_shardings
from lmlab.plan.speed import speed
from lmlab.plan.table import advice, collective_lines, memory_lines, sharding_lines, speed_lines
from lmlab.recipe import MultiToken, Pretrain
from lmlab.train.config import ParallelConfig
from lmlab.train.device import chip_named
from lmlab.training import build_lm

COMPILE_SECONDS = 1800


def parse_mesh(text: str, default: ParallelConfig) -> dict[str, int]:
    """Devices by axis from DATAxFSDPxTENSOR or DATAxFSDPxCONTEXTxTENSOR; empty: those of a recipe."""
    expected = "DATAxFSDPxTENSOR or DATAxFSDPxCONTEXTxTENSOR, each at least 1, such as 8x4x2"
    if not text:
        return {axis: max(getattr(default, axis), 1) for axis in MESH_AXES}
    words = text.lower().split("x")
    good = len(words) in (3, 4) and all(word.isascii() and word.isdigit() and 0 < int(word) < 10**6 for word in words)
    check(good, "mesh", text, expected)
    sizes = [int(word) for word in words]
    if len(sizes) == 3:
        sizes.insert(2, 1)
    return dict(zip(MESH_AXES, sizes, strict=True))


def with_known_vocabulary(config: Pretrain) -> Pretrain:
    """The recipe with the size of its vocabulary, read off the tokenizer where no data are needed for that."""
    if config.model.vocab_size:
        return config
    match config.data.tokenizer:
        case Bytes():
            size = 257
        case TrainedBPE(vocab_size=size):
            pass
        case TokenizerFile(path=path, end_token=end):
            check(Path(path).expanduser().is_file(), "data.tokenizer.path", path, "an existing tokenizer.json",
                  "Or tell the size: --model.vocab-size 32000.")  # fmt: skip
            from lmlab.data.tokenizers import build_tokenizer

            size = build_tokenizer(TokenizerFile(path, end), lambda: iter(()), Path(), "").vocab_size
    return replace(config, model=replace(config.model, vocab_size=size))


def ready(config: Pretrain, shape: Mapping[str, int]) -> Pretrain:
    """The recipe for that mesh, with its vocabulary; layers in a scan, so that compiling does not grow with depth."""
    check(not isinstance(config, MultiToken), "recipe", "MultiToken", "a model of one head",
          "What further heads need is not foreseen: plan the same model in a recipe Pretrain.")  # fmt: skip
    config = with_known_vocabulary(config)
    execution = replace(config.model.execution, unroll=1)
    sizes: dict[str, Any] = dict(shape)
    parallel = replace(config.parallel, **sizes)
    return replace(config, model=replace(config.model, execution=execution), parallel=parallel)


def plan(config: Pretrain, mesh: str, chip_name: str, compiler: str, mfu: float) -> str:
    """What one device of the mesh needs and how long a step takes, as text. Raises `UserError` on what cannot be."""
    chip = chip_named(chip_name)
    check(0 < mfu <= 1, "mfu", mfu, "a share in (0, 1]")
    shape = parse_mesh(mesh, config.parallel)
    config = ready(config, shape)
    devices = math.prod(shape.values())
    # cuDNN's attention keeps what the TPU kernel keeps, and only that one can be traced without its device.
    memory = predict(config, shape, "tpu", chip.kind)
    times = speed(config, shape, chip, memory, mfu)
    compiler = found_compiler(compiler, chip_name, devices)
    compiled = None if compiler == "none" else compile_apart(config, shape, chip_name, compiler, COMPILE_SECONDS)
    parts = " x ".join(f"{axis} {size}" for axis, size in shape.items())
    execution = config.model.execution
    lines = [
        f"{devices} x {chip_name}: {parts}",
        f"{_count(config) / 1e9:.3g}B parameters, {config.data.batch_size} x {config.data.length} tokens in "
        f"{config.train.microbatches} microbatch(es), {execution.compute_dtype}, remat {execution.remat}",
        "",
        *memory_lines(memory, compiled, chip, chip_name),
    ]
    if config.parallel.offload != "none":
        lines.append("(parallel.offload is not counted: the optimizer's state is taken to stay on the device)")
    if "DOES NOT FIT" in lines[-1] + lines[-2]:
        lines += advice(memory, config, shape)
    lines += ["", *speed_lines(times, mfu, devices)]
    return "\n".join(lines + (["", *collective_lines(compiled)] if compiled else []))


def _count(config: Pretrain) -> int:
    lm = build_lm(config)
    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(lm.init, jax.random.key(0))))


def shardings(config: Pretrain, mesh: str) -> str:
    """Where every parameter of a recipe lies on a mesh, as text. Raises `UserError` naming what does not divide."""
    shape = parse_mesh(mesh, config.parallel)
    config = ready(config, shape)
    lm = build_lm(config)
    shapes = jax.tree_util.tree_leaves_with_path(jax.eval_shape(lm.init, jax.random.key(0)))
    widths = {path_name(path): leaf.dtype.itemsize for path, leaf in shapes}
    abstract = mesh_for(shape, "cpu", "cpu")
    return "\n".join(sharding_lines(table_of_shardings(config, abstract), abstract, widths))
