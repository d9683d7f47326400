"""Bytes that one device needs for a train step, from the recipe and the shape of the mesh alone.

What is stored is counted exactly. What is computed is the step of one device: the same model with the heads, the
feed-forward width, the vocabulary and the rows that fall to it, traced, and its buffers estimated by `liveness`.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from lmlab.core.errors import check
from lmlab.core.sharding import MESH_AXES, ROWS
from lmlab.core.types import TokenBatch
from lmlab.models.lm import LM
from lmlab.objectives.next_token import next_token
from lmlab.optim.chain import build_optimizer
from lmlab.plan.liveness import Buffer, buffers_of, peak
from lmlab.recipe import Pretrain
from lmlab.train.parallel import Placed, abstract_state, check_rows, param_shardings, placements, state_shardings
from lmlab.train.state import State
from lmlab.train.step import Step, make_step
from lmlab.training import build_lm


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the fullest moment of a step."""

    parameters: float
    optimizer: float
    batch: float
    gradients: float
    """Of all parameters: what a backward pass adds to, and the sum over microbatches."""
    activations: float
    """What layers keep for the backward pass."""
    logits: float
    """Of one chunk; 0 where the fullest moment is another."""
    working: float
    """Everything else: what the layer in hand works with, weights that it brings together."""

    @property
    def total(self) -> float:
        """Their sum."""
        return sum(vars(self).values())


def mesh_for(shape: Mapping[str, int], platform: str, kind: str) -> AbstractMesh:
    """A mesh without devices."""
    device = AbstractDevice(device_kind=kind, num_cores=1, platform=platform)
    sizes = tuple(shape[axis] for axis in MESH_AXES)
    return AbstractMesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * len(sizes), abstract_device=device)


def table_of_shardings(config: Pretrain, mesh: Any) -> list[Placed]:
    """Where each parameter lies. Raises `UserError` naming the dimension that the mesh does not divide."""
    lm = build_lm(config)
    return placements(lm.axes, jax.eval_shape(lm.init, jax.random.key(0)), mesh)


def parts_of(placed: Placed, mesh: Any, *axes: str) -> int:
    """Into how many parts a parameter is cut, along the given axes of the mesh or all."""
    named = [axis for entry in placed.spec if entry for axis in ((entry,) if isinstance(entry, str) else entry)]
    return math.prod(mesh.shape[axis] for axis in named if not axes or axis in axes)


def check_fits(config: Pretrain, mesh: Any) -> None:
    """Raise `UserError` unless rows, sequence and parameters divide by the mesh."""
    check_rows(mesh, config.data.batch_size, config.train.microbatches)
    check(config.data.length % mesh.shape["context"] == 0, "data.length", config.data.length,
          f"a multiple of parallel.context = {mesh.shape['context']}")  # fmt: skip
    table_of_shardings(config, mesh)


def train_step(config: Pretrain) -> tuple[LM, State, Step]:
    """The model, the shapes of its state, and the step that a recipe trains with."""
    lm = build_lm(config)
    tx = build_optimizer(config.optim, lm.axes, config.train.steps, config.train.seed)
    token_bytes_V = jnp.zeros(config.model.vocab_size, jnp.float32)
    objective = next_token(
        lm, z_loss=config.objective.z_loss, chunk=config.objective.chunk, token_bytes_V=token_bytes_V
    )
    return lm, abstract_state(lm.init, tx), make_step(objective, tx, microbatches=config.train.microbatches)


def batch_shapes(rows: int, length: int) -> TokenBatch:
    """A batch of that many rows of length + 1 tokens."""
    shape: Any = lambda dtype: jax.ShapeDtypeStruct((rows, length + 1), dtype)
    return TokenBatch(shape(jnp.int32), shape(jnp.int32), shape(jnp.int32), shape(jnp.bool_))


def share_of_one(config: Pretrain, shape: Mapping[str, int]) -> Pretrain:
    """The recipe as one device computes it, but for `fsdp`: weights are whole where they are used."""
    model, tensor = config.model, shape["tensor"]
    rows = math.prod(shape[axis] for axis in ROWS)
    model = replace(model.part(tensor), execution=replace(model.execution, unroll=1))
    return replace(config, model=model, data=replace(config.data, batch_size=config.data.batch_size // rows))


def stored_bytes(config: Pretrain, mesh: Any) -> tuple[float, float, float]:
    """Bytes of parameters, optimiser state and batch that lie on one device before a step, exactly."""
    lm, state, _ = train_step(config)
    shardings = state_shardings(state, param_shardings(lm.axes, state.params, mesh))

    def held(shapes: Any, places: Any) -> float:
        size = lambda x, place: math.prod(place.shard_shape(x.shape)) * _width(x.dtype)
        return sum(jax.tree.leaves(jax.tree.map(size, shapes, places)))

    parameters = held(state.params, shardings.params)
    batch = batch_shapes(config.data.batch_size // math.prod(mesh.shape[a] for a in ROWS), config.data.length)
    rows = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(batch))
    return parameters, held(state, shardings) - parameters, rows


def _width(dtype: Any) -> int:
    return 8 if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key) else dtype.itemsize


def predict(config: Pretrain, shape: Mapping[str, int], platform: str = "cpu", kind: str = "cpu") -> Memory:
    """Memory of a step on a mesh of this shape: a pure function, nothing is compiled.

    shape: devices by axis of the mesh. platform, kind: of the devices; they decide the attention back-end.
    Raises `UserError` where the mesh does not divide rows or parameters.
    """
    mesh = mesh_for(shape, platform, kind)
    check_fits(config, mesh)
    own = share_of_one(config, shape)
    _, state, step = train_step(own)
    only_context = {axis: shape[axis] if axis == "context" else 1 for axis in MESH_AXES}
    with jax.sharding.use_abstract_mesh(mesh_for(only_context, platform, kind)):
        batch = batch_shapes(own.data.batch_size, own.data.length)
        jaxpr = jax.make_jaxpr(step)(state, batch)
    scaled = list(_scaled(buffers_of(jaxpr.jaxpr, donated=True), own, shape))
    _, moment = peak(scaled)
    alive = [b for b in scaled if b.start <= moment <= b.end]
    kinds = {name: sum(b.bytes for b in alive if is_it(b.shape)) for name, is_it in _kinds(own).items()}
    return Memory(*stored_bytes(config, mesh), **kinds, working=sum(b.bytes for b in alive) - sum(kinds.values()))


def _kinds(own: Pretrain) -> dict[str, Callable[[tuple[int, ...]], bool]]:
    """What a buffer holds, told by its shape. Those that fit none are working memory."""
    model = own.model
    known = {placed.shape for placed in table_of_shardings(own, _one())}
    kept = (model.layers, own.data.batch_size // own.train.microbatches)
    stacked = lambda shape: len(shape) > 2 and shape[:2] == kept and shape not in known
    wide = lambda shape: len(shape) > 1 and shape[-1] == model.vocab_size and shape != (model.width, shape[-1])
    return {
        "gradients": lambda shape: shape in known,
        "activations": stacked,
        "logits": lambda shape: wide(shape) and shape not in known and not stacked(shape),
    }


def _one() -> AbstractMesh:
    return mesh_for(dict.fromkeys(MESH_AXES, 1), "cpu", "cpu")


def _scaled(buffers: list[Buffer], own: Pretrain, shape: Mapping[str, int]) -> Iterator[Buffer]:
    """The buffers with what `fsdp` and `context` leave of each on one device.

    Gradients of layers, and all that the optimiser makes, are in parts from the start. A table's gradient is whole
    until the loop that adds it up is over, and in parts from then on; on a mesh with `tensor` it stays whole (see
    `lmlab.core.sharding.sum_over_tokens`).
    """
    mesh = mesh_for({**shape, "tensor": 1}, "cpu", "cpu")
    parts = {placed.shape: parts_of(placed, mesh, "fsdp") for placed in table_of_shardings(own, mesh)}
    rows, context = own.data.batch_size // own.train.microbatches, shape["context"]
    tokens = [(rows, own.data.length), (rows, own.data.length + 1)]
    is_logits = _kinds(own)["logits"]
    logits = [b for b in buffers if is_logits(b.shape)]
    for b in buffers:
        pieces = parts.get(b.shape, 1)
        table = pieces > 1 and b.shape[0] != own.model.layers and b.made > b.start
        if table and shape["tensor"] > 1:
            yield b
        elif table:
            yield b._replace(end=b.made)
            yield b._replace(start=b.made, bytes=b.bytes / pieces)
        elif any(pair in tokens for pair in zip(b.shape, b.shape[1:], strict=False)):
            yield b._replace(bytes=b.bytes / context)
        else:
            yield b._replace(bytes=b.bytes / pieces)
    if shape["fsdp"] > 1 and own.model.execution.compute_dtype == "float32" and logits:
        # The table, brought together for the look-up and for the loop over chunks. In another type than the stored
        # one the trace holds it, as the result of the cast.
        whole, end = 4.0 * own.model.vocab_size * own.model.width, max(b.end for b in logits)
        yield Buffer(whole, 0, end, end, (own.model.width, own.model.vocab_size))
