"""Seconds of a train step on a chip, from counts: operations, bytes over links, bytes from memory."""

import math
from collections.abc import Mapping
from typing import NamedTuple

from lmlab.core.errors import UserError
from lmlab.core.sharding import MESH_AXES, ROWS
from lmlab.models.config import DecoderConfig
from lmlab.models.flops import training_flops_per_token
from lmlab.plan.memory import Memory
from lmlab.recipe import Pretrain
from lmlab.train.device import Chip


class Speed(NamedTuple):
    """Of one step; seconds unless said otherwise."""

    flops_per_token: float
    """Forward and backward, recomputation not counted."""
    tokens: int
    """In a step, over all devices."""
    at_peak: float
    """What the matmuls take at the peak of the chip, those that are done twice included."""
    at_mfu: float
    """What the step takes at the assumed share of the peak."""
    links: dict[str, float]
    """What the collectives take at the rate of the links, by axis of the mesh."""
    memory: float
    """What the least traffic with memory takes."""

    @property
    def slowest(self) -> float:
        """Step time where collectives hide behind the computation."""
        return max(self.at_mfu, sum(self.links.values()), self.memory)

    @property
    def added(self) -> float:
        """Step time where they do not."""
        return max(self.at_mfu, self.memory) + sum(self.links.values())


def weights(model: DecoderConfig) -> int:
    """Parameters that are matrices: all but norms and biases."""
    return model.layers * model.layer_weights + model.vocab_size * model.width * (1 if model.tied else 2)


def speed(config: Pretrain, shape: Mapping[str, int], chip: Chip, memory: Memory, mfu: float) -> Speed:
    """The parts of a step's time. mfu: assumed share of the peak. Raises `UserError` if the peak is not known."""
    model, dtype = config.model, config.model.execution.compute_dtype
    if dtype not in chip.tflops:
        raise UserError(
            "model.execution.compute_dtype", dtype, f"one whose peak is published: {', '.join(chip.tflops)}"
        )
    tokens = config.data.batch_size * config.data.length
    flops = training_flops_per_token(model, config.data.length)
    # The layers' forward pass, a third of their count, is done a second time.
    head = 6.0 * model.vocab_size * model.width
    again = (flops - head) / 3 if model.execution.remat == "full" else 0.0
    rate = chip.tflops[dtype] * 1e12 * math.prod(shape.values())
    sent = link_bytes(config, shape)
    return Speed(
        flops, tokens, tokens * (flops + again) / rate, tokens * flops / (rate * mfu),
        {axis: size / link_rate(chip, shape, axis) for axis, size in sent.items()},
        memory_bytes(config, shape, memory) / chip.memory_rate,
    )  # fmt: skip


def link_rate(chip: Chip, shape: Mapping[str, int], axis: str) -> float:
    """Bytes a second along an axis of the mesh; the fastest axes are neighbours, within a node of GPUs if they fit."""
    span = math.prod(shape[name] for name in MESH_AXES[MESH_AXES.index(axis) :])
    return chip.network_rate if chip.node and span > chip.node else chip.link_rate


def link_bytes(config: Pretrain, shape: Mapping[str, int]) -> dict[str, float]:
    """Bytes that one device sends in a step, by axis of the mesh, on a ring.

    fsdp: weights are gathered in the compute type for the forward and the backward pass of every microbatch, and
    gradients scattered in float32. data: gradients are summed in float32. tensor: the residual stream is summed twice
    a layer forward, twice backward, and twice more where the layer is computed again. context: keys and values are
    gathered twice and their gradients scattered.
    """
    model, times = config.model, config.train.microbatches
    width = 2 if model.execution.compute_dtype == "bfloat16" else 4
    fsdp, data, tensor, context = (shape[axis] for axis in ("fsdp", "data", "tensor", "context"))
    tokens = config.data.batch_size * config.data.length / math.prod(shape[axis] for axis in ROWS)
    own = weights(model) / tensor
    part = lambda size: (size - 1) / size
    stream = tokens / context * model.width * width * model.layers * (6 if model.execution.remat == "full" else 4)
    pairs = tokens * 2 * model.kv_heads / tensor * model.head_dim * width * model.layers
    sent = {
        "data": times * 2 * part(data) * 4 * own / fsdp,
        "fsdp": times * part(fsdp) * own * (2 * width + 4),
        "context": 3 * part(context) * pairs,
        "tensor": 2 * part(tensor) * stream,
    }
    return {axis: size for axis, size in sent.items() if size}


def memory_bytes(config: Pretrain, shape: Mapping[str, int], memory: Memory) -> float:
    """Bytes to and from memory that no step can do without; what layers write and read between is not counted.

    Weights are read in the compute type by every pass over every microbatch, gradients added up in float32, what is
    kept for the backward pass written and read, and the state read and written once.
    """
    execution, times = config.model.execution, config.train.microbatches
    width = 2 if execution.compute_dtype == "bfloat16" else 4
    own = weights(config.model) / shape["tensor"]
    passes = 3 if execution.remat == "full" else 2
    gradients = 4 * own / shape["fsdp"]
    state = 2 * (memory.parameters + memory.optimizer)
    return times * (passes * own * width + 2 * gradients + 2 * memory.activations) + state + gradients
