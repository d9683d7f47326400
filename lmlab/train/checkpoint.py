"""Checkpoints by orbax: asynchronous, atomic, and verified when they are read.

A checkpoint holds three items: `params` (restorable alone), `rest` (step, optimiser state, key) and `meta` (JSON: what
the state looks like, a digest of every array, and what the caller adds). The digest is what notices a flipped bit.
"""

import gc
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from lmlab.core.errors import UserError
from lmlab.core.types import Array, Params
from lmlab.optim.groups import path_name
from lmlab.train.hosts import all_do, any_process, first_does
from lmlab.train.state import State

DAMAGED = "damaged-"


@dataclass(frozen=True)
class Checkpoints:
    """An open folder of checkpoints."""

    folder: Path
    manager: ocp.CheckpointManager
    say: Callable[[str], None]
    """Where the line goes that tells of a damaged checkpoint."""


def open_checkpoints(
    folder: Path, keep_last: int = 2, keep_best: int = 1, say: Callable[[str], None] = print
) -> Checkpoints:
    """Open or create a folder of checkpoints that keeps the newest and those of lowest `held_out`."""
    best = policies.BestN(
        get_metric_fn=lambda metrics: -metrics["held_out"],
        n=keep_best,
        keep_checkpoints_without_metrics=False,
    )
    keep = [policies.LatestN(keep_last)] + ([best] if keep_best else [])
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy(keep), cleanup_tmp_directories=True,
        enable_async_checkpointing=True,
    )  # fmt: skip
    try:
        folder.mkdir(parents=True, exist_ok=True)
        manager = ocp.CheckpointManager(folder.resolve(), options=options, item_names=("params", "rest", "meta"))
    except OSError as error:
        raise disk_error(folder, error) from error
    return Checkpoints(folder, manager, say)


def save(checkpoints: Checkpoints, state: State, extra: Mapping[str, Any], held_out: float | None = None) -> None:
    """Start to write the state of this step; returns once the arrays are copied from the device.

    extra: JSON, for instance the identity of model and data. held_out: loss by which the best are kept.
    Raises `UserError` where there is no room for it, or an earlier write has failed.
    """
    step = int(state.step)
    if step in checkpoints.manager.all_steps():
        return
    all_do(lambda: _check_room(checkpoints.folder, sum(leaf.nbytes for leaf in jax.tree.leaves(state))))
    rest = replace(state, params={})
    meta = {"shapes": shapes(state), "digests": digests(state), "extra": dict(extra)}
    items = ocp.args.Composite(
        params=ocp.args.StandardSave(state.params),
        rest=ocp.args.StandardSave(rest),
        meta=ocp.args.JsonSave(meta),
    )
    try:
        checkpoints.manager.save(step, args=items, metrics=None if held_out is None else {"held_out": held_out})
    except (OSError, ValueError) as error:
        raise disk_error(checkpoints.folder, error) from error


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise disk_error(folder, f"A checkpoint takes {needed:,} bytes and {free:,} are free")


def finish(checkpoints: Checkpoints) -> None:
    """Wait until everything is written, and close. Raises `UserError` where a write has failed."""
    try:
        checkpoints.manager.wait_until_finished()
        checkpoints.manager.close()
    except (OSError, ValueError) as error:
        raise disk_error(checkpoints.folder, error) from error


def disk_error(folder: Path, error: Exception | str) -> UserError:
    """A failed write as the user should read it."""
    why = " ".join(str(error).split())
    # The root of a chain of errors stands at its end.
    why = why if len(why) < 200 else f"... {why[-200:]}"
    remedy = f"{why}. Checkpoints that were complete are kept: make room or choose another folder, then run again."
    return UserError("run folder", str(folder), "a folder that can be written to, with room on its disk", remedy)


def restore(checkpoints: Checkpoints, state: State) -> State | None:
    """The newest intact state; None where the folder has never held one.

    state: what to restore into, arrays or shapes (with shardings). A damaged checkpoint is moved aside, a line
    says so, and the one before is read. Raises `UserError` if the checkpoint is of another model or
    optimiser, or if all are damaged.
    """

    def read(step: int, meta: Mapping[str, Any]) -> State:
        _check_shapes(checkpoints.folder, meta["shapes"], shapes(state))
        like = ocp.args.StandardRestore
        restored = _read(checkpoints, step, params=like(state.params), rest=like(replace(state, params={})))
        whole = replace(restored["rest"], params=restored["params"])
        _verify(whole, meta["digests"])
        return whole

    return _newest_intact(checkpoints, read)


def restore_params(
    checkpoints: Checkpoints, params: Params, unread: Params | None = None
) -> tuple[int, Params] | None:  # fmt: skip
    """Step and parameters of the newest intact checkpoint, whatever optimiser made it.

    unread: shapes of what stands beside them, and is left there.
    """
    beside = unread or {}
    places = ocp.checkpoint_utils.construct_restore_args(params)
    like = ocp.args.PyTreeRestore(params, restore_args=places, partial_restore=True)

    def read(step: int, meta: Mapping[str, Any]) -> tuple[int, Params]:
        _check_shapes(checkpoints.folder, _under(meta["shapes"], "params/"), shapes({"params": {**params, **beside}}))
        restored = _read(checkpoints, step, params=like)["params"]
        known = shapes({"params": params})
        _verify({"params": restored}, {name: meta["digests"][name] for name in known})
        return step, restored

    return _newest_intact(checkpoints, read)


def _under(table: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name: value for name, value in table.items() if name.startswith(prefix)}


def _newest_intact(checkpoints: Checkpoints, read: Callable[[int, Mapping[str, Any]], Any]) -> Any:
    checkpoints.manager.wait_until_finished()
    for step in sorted(checkpoints.manager.all_steps(), reverse=True):
        try:
            meta = _read(checkpoints, step, meta=ocp.args.JsonRestore())["meta"]
            return read(step, meta)
        except UserError:
            raise
        except Exception as error:  # damage shows in any layer: JSON, zarr, zlib, a missing file, our digest
            why = " ".join(str(error).split()).partition(". ")[0][:160]
        first_does(partial(_set_aside, checkpoints, step, why))
        checkpoints.manager.reload()
        _drop_suspended_reads()
    if any(checkpoints.folder.glob(f"{DAMAGED}*")):
        raise UserError("checkpoints", str(checkpoints.folder), "at least one intact checkpoint",
                        f"The damaged ones are kept as {DAMAGED}*; remove them to start from nothing.")  # fmt: skip
    return None


def _read(checkpoints: Checkpoints, step: int, **items: Any) -> Any:
    """Items of a checkpoint. Raises in every process if one cannot read them, before any computes with them."""
    folder, found, failed = checkpoints.folder.resolve() / str(step), None, None
    try:
        # Not by the manager, inside of which the processes would wait for the one that has failed.
        found = ocp.CompositeCheckpointHandler().restore(folder, args=ocp.args.Composite(**items))
    except Exception as error:
        failed = error
    if any_process(failed is not None):
        raise failed or OSError("another process cannot read it")
    return found


def _set_aside(checkpoints: Checkpoints, step: int, why: str) -> None:
    """Move a damaged checkpoint out of the way, never delete it."""
    target = checkpoints.folder / f"{DAMAGED}{step}"
    for old in range(1, 1000):
        if not target.exists():
            break
        target = checkpoints.folder / f"{DAMAGED}{step}.{old}"
    shutil.move(checkpoints.folder / str(step), target)
    checkpoints.say(f"checkpoint {step} is damaged ({why}): kept as {target.name}, falling back to the one before")


def _drop_suspended_reads() -> None:
    """Orbax leaves the other reads of a restore that failed half done, and each prints a traceback when it is
    collected. What is wrong has been said, so they are collected here, in silence.
    """
    hook, sys.unraisablehook = sys.unraisablehook, lambda unraisable: None
    try:
        gc.collect()
    finally:
        sys.unraisablehook = hook


def shapes(tree: Any) -> dict[str, str]:
    """Shape and type of every array by path, as text."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_name(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


def _check_shapes(folder: Path, saved: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    for name in [*wanted, *saved]:
        have, want = saved.get(name, "nothing"), wanted.get(name, "nothing")
        if have != want:
            raise UserError("checkpoints", str(folder), f"{want} at {name}, as this config makes it, not {have}",
                            "It is of another model or optimiser: use its config or another folder.")  # fmt: skip


def digests(tree: Any) -> dict[str, int]:
    """A 32-bit number of every array by path, the same on any device mesh; any single change alters it."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    values = jax.device_get(_digest_leaves([leaf for _, leaf in leaves]))
    return {path_name(path): int(value) for (path, _), value in zip(leaves, values, strict=True)}


def _verify(tree: Any, saved: Mapping[str, int]) -> None:
    found = digests(tree)
    wrong = [name for name in saved if found.get(name) != saved[name]]
    if wrong:
        raise OSError(f"the digest of {wrong[0]} differs" + (f", and {len(wrong) - 1} more" if wrong[1:] else ""))


@jax.jit
def _digest_leaves(leaves: list[Array]) -> list[Array]:
    # Some may wait in the memory of the host.
    return [_digest(jax.device_put(leaf, jax.memory.Space.Device)) for leaf in leaves]


def _digest(x: Array) -> Array:
    """Sum over i of bits_i * (2 mix(i) + 1) mod 2^32. The factors are odd, so a change of one element shows for
    certain; sums that wrap do not depend on their order, so neither does the digest on the sharding.
    """
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    word = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(x, word).astype(jnp.uint32)
    index = jnp.zeros(x.shape, jnp.uint32)
    for axis in range(x.ndim):
        index = index * x.shape[axis] + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    mixed = (index ^ (index >> 15)) * jnp.uint32(0x2C1B3C6D)
    return jnp.sum(bits * (2 * (mixed ^ (mixed >> 12)) + 1), dtype=jnp.uint32)
