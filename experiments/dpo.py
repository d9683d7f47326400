"""Direct preference optimisation of any model that lmlab reads, on pairs of answers.

    python -m experiments.dpo --source MODEL --data.train 'pairs/*.jsonl' --export FOLDER

MODEL is a run, a folder of transformers, a .gguf file or a llama2.c .bin; it is the reference, too. A line of the data
has "prompt", "chosen" and "rejected" (see --help for other shapes). Held-out loss, accuracy of the implicit reward,
margins and log-probabilities are shown before the first step and on the way, and answers are drawn.
--lora.rank 16 trains adapters alone, which want a higher rate: --optim.schedule.peak 1e-4. --loss.loss takes the other
losses of the family.

Interrupt it at any moment and run the same command again: it goes on, bit for bit.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro

from experiments.sft import export_after
from lmlab.cli import exit_code
from lmlab.commands import RUNS, train
from lmlab.recipe import Preference
from lmlab.train.config import HostsConfig

NAME = "python -m experiments.dpo"


@dataclass(frozen=True)
class Options:
    """Train a model on pairs of answers of which one was preferred. Run the same command again to go on."""

    config: Annotated[Preference, tyro.conf.arg(name="")]
    out: str = str(RUNS / "dpo")
    """Run folder."""
    export: str = ""
    """When finished, write the model here as a folder of transformers; it must not exist, or be empty."""
    profile: str = ""
    """FIRST:LAST: trace these steps (profile/ in the run folder) and tell which operations took their time."""
    hosts: HostsConfig = field(default_factory=HostsConfig)


def run(options: Options) -> int:
    """Train, then export; the exit code is that of `lmlab run`."""
    from lmlab.core.runtime import prepare
    from lmlab.preference import prefer

    prepare()
    method = partial(train, partial(prefer, options.config), options.config.train.steps, options.out, options.profile)
    return export_after(lambda: method(options.hosts), Path(options.out), options.export, options.hosts)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code, as `lmlab` does."""
    avoid = (tyro.conf.AvoidSubcommands,)
    return exit_code(lambda: run(tyro.cli(Options, prog=NAME, args=argv, config=avoid)))


if __name__ == "__main__":
    sys.exit(main())
