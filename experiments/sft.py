"""Supervised fine-tuning of any model that lmlab reads, on conversations.

    python -m experiments.sft --source MODEL --data.train 'chats/*.jsonl' --export FOLDER

MODEL is a run, a folder of transformers, a .gguf file or a llama2.c .bin; held-out loss and answers are shown before
the first step and on the way. SmolLM2-135M-Instruct (Q4_1, GGUF) on 8.9k records of Alpaca, 40 steps of 4 x 256 tokens
with --optim.schedule.peak 1e-4: expect the held-out loss to fall from 1.95 to 1.75 nats per token of an answer, in ten
minutes on two shared CPU cores (4 s a step where they are free), with 10 GB of memory.

Interrupt it at any moment and run the same command again: it goes on, bit for bit.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro

from lmlab.cli import exit_code
from lmlab.commands import RUNS, train
from lmlab.core.errors import check
from lmlab.recipe import SFT
from lmlab.train.config import HostsConfig

NAME = "python -m experiments.sft"


@dataclass(frozen=True)
class Options:
    """Fine-tune a model on what the assistant says in conversations. Run the same command again to go on."""

    config: Annotated[SFT, tyro.conf.arg(name="")]
    out: str = str(RUNS / "sft")
    """Run folder."""
    export: str = ""
    """When finished, write the model here as a folder of transformers; it must not exist, or be empty."""
    profile: str = ""
    """FIRST:LAST: trace these steps (profile/ in the run folder) and tell which operations took their time."""
    hosts: HostsConfig = field(default_factory=HostsConfig)


def run(options: Options) -> int:
    """Train, then export; the exit code is that of `lmlab run`."""
    from lmlab.core.runtime import prepare
    from lmlab.finetune import sft

    prepare()
    method = partial(train, partial(sft, options.config), options.config.train.steps, options.out, options.profile)
    return export_after(lambda: method(options.hosts), Path(options.out), options.export, options.hosts)


def export_after(method: Callable[[], int], run: Path, target: str, hosts: HostsConfig) -> int:
    """Train by `method` into the folder `run`, and write the model to `target` if that is named. Returns its code."""
    from lmlab.interop.huggingface import check_empty
    from lmlab.loading import export
    from lmlab.train.hosts import is_first

    if target:
        check(not hosts.address, "--export", target, "a job of one process",
              "Write it afterwards: lmlab convert RUN FOLDER.")  # fmt: skip
        check_empty(Path(target))
    code = method()
    if code == 0 and target:
        export(run, Path(target))
    if code == 0 and is_first():
        print(f"export  {target or f'lmlab convert {run} FOLDER'}")
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code, as `lmlab` does."""
    avoid = (tyro.conf.AvoidSubcommands,)
    return exit_code(lambda: run(tyro.cli(Options, prog=NAME, args=argv, config=avoid)))


if __name__ == "__main__":
    sys.exit(main())
