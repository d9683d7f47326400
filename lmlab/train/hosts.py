"""A job of several processes, one a host: joining it, what only the first does, and what all have to agree on.

Every process runs the same program in the same order (https://docs.jax.dev/en/latest/multi_process.html); with one
process all of this comes down to nothing.
"""

import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lmlab.core.errors import UserError, check
from lmlab.train.config import HostsConfig


def join(config: HostsConfig) -> None:
    """Join the job, before anything touches a device. Raises `UserError` where there is none to join."""
    if not config.address:
        return
    if config.address == "auto":
        # Cloud TPU, GKE, SLURM and Open MPI tell a process what it needs.
        given: dict[str, Any] = {}
    else:
        check(":" in config.address, "hosts.address", config.address, "auto, or HOST:PORT of the first process")
        check(config.count >= 1 and 0 <= config.index < config.count, "hosts.index", config.index,
              f"0 to hosts.count - 1 (hosts.count is {config.count})", "Every process has its own index."
              )  # fmt: skip
        given = {
            "coordinator_address": config.address, "num_processes": config.count, "process_id": config.index,
        }  # fmt: skip
    try:
        jax.distributed.initialize(**given, initialization_timeout=config.patience)
    except (RuntimeError, ValueError) as error:
        why = " ".join(str(error).split())[:300]
        raise UserError("hosts.address", config.address, f"a job that all its processes join ({why})",
                        "Start the same command on every host, each with its own hosts.index.") from error  # fmt: skip


def is_first() -> bool:
    """Whether this process writes the files and talks to the user."""
    return jax.process_index() == 0


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process. All have to ask."""
    return flag if jax.process_count() == 1 else bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def first_does(action: Callable[[], object]) -> None:
    """Run `action` in the first process, then go on everywhere. Raises `UserError` everywhere if it did there."""
    failed: UserError | None = None
    if is_first():
        try:
            action()
        except UserError as error:
            failed = error
    if any_process(failed is not None):
        raise failed or UserError("job", f"process {jax.process_index()}", "the first process to go on",
                                  "It has said why it could not.")  # fmt: skip


def same_everywhere(field: str, value: str) -> None:
    """Raise `UserError` unless `value` is the same text in every process."""
    if jax.process_count() == 1:
        return
    marks = multihost_utils.process_allgather(np.asarray(zlib.crc32(value.encode()), np.uint32))
    other = np.flatnonzero(marks != marks[0])
    check(not len(other), field, value[:200], f"the same in all processes (process {other[:1]} has another)",
          "Run the same command, on the same data, with the same versions, on every host.")  # fmt: skip


def agreement() -> Callable[[int], int]:
    """A function to call once a step with a number: gives the largest that any process passed to the call before.

    So a signal that one process receives is seen by all after the same step, and none waits for it: the exchange of
    this step is read at the next.
    """
    if jax.process_count() == 1:
        return lambda number: number
    mesh = jax.make_mesh((jax.device_count(),), ("all",), axis_types=(AxisType.Auto,))
    divided, whole = NamedSharding(mesh, PartitionSpec("all")), NamedSharding(mesh, PartitionSpec())
    largest = jax.jit(jnp.max, out_shardings=whole)
    pending: list[jax.Array] = []

    def agree(number: int) -> int:
        mine = np.full(jax.local_device_count(), number, np.int32)
        pending.append(largest(jax.make_array_from_process_local_data(divided, mine)))
        return int(pending.pop(0)) if len(pending) > 1 else 0

    return agree
