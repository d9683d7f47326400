"""SMC steering beside masked decoding and exact texts (arXiv 2306.03081).

    python -m experiments.smc_steering [--smoke] [--out FOLDER] [--model FOLDER_OR_GGUF]

First a model of bytes, 2 layers of width 64, which is trained on the sources and help texts of Python: no word may be
longer than 4 letters for 24 bytes. Rejection sampling gives exact texts and Z, the probability of the constraint. Beside
them masked decoding, importance sampling, standard SMC and SMC steering (K = 3), each with the plain proposal and with
the locally optimal one, by number of particles: how far log Z-hat lies below log Z, whether the mean of Z-hat is Z, how
probable the texts are and how their beginnings are spread, and how many ancestors are left. All decode N rows a round.

Prints tables; writes results.json and smc_steering.svg. Expect about 8 minutes on two CPU cores, 6 where the model of a
run before is found in the folder.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import tyro

from experiments.results import carry_out
from experiments.smc_figures import draw_words, words_table
from experiments.smc_words import Sizes, run_words
from lmlab.cli import exit_code
from lmlab.core.errors import check
from lmlab.report.plots import drawing

NAME = "python -m experiments.smc_steering"


@dataclass(frozen=True)
class Options:
    """Sample under constraints by masking, by rejection, by SMC and by SMC steering."""

    out: str = "runs/smc_steering"
    """Where the small model, results.json and the figure go."""
    smoke: bool = False
    """A few steps and runs, to see that it runs."""
    steps: int = 1000
    """Training of the small model, 4096 bytes each."""
    prompts: int = 4
    """Held-out beginnings that it goes on from."""
    seeds: int = 100
    """Runs of each arm after each of them."""
    particles: tuple[int, ...] = (2, 4, 8, 16, 32)
    """Numbers of particles."""
    draws: int = 65536
    """Of rejection sampling after each beginning."""


def run(options: Options) -> dict[str, Any]:
    """Check and run."""
    for name, least in (("steps", 1), ("prompts", 1), ("seeds", 2), ("draws", 1)):
        check(getattr(options, name) >= least, f"--{name}", getattr(options, name), f"at least {least}")
    check(options.prompts <= 8, "--prompts", options.prompts, "at most 8")
    check(bool(options.particles) and min(options.particles) >= 1, "--particles", options.particles,
          "numbers of at least 1")  # fmt: skip
    if options.smoke:
        options = replace(options, steps=20, prompts=2, seeds=4, particles=(2, 4), draws=2048)
    sizes = Sizes(options.steps, options.prompts, options.seeds, options.particles, options.draws)
    return {"options": asdict(options), "words": run_words(Path(options.out), sizes)}


def table(result: dict[str, Any]) -> str:
    """All that was found, as text."""
    return words_table(result["words"])


def draw(result: dict[str, Any], path: Path) -> None:
    """Four panels of the small model."""
    with drawing(path, 11, 6.5) as drawn:
        draw_words(result["words"], list(drawn.subplots(2, 2).flat))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code, as `lmlab` does."""
    return exit_code(
        lambda: carry_out(tyro.cli(Options, prog=NAME, args=argv), run, draw, table, "smc_steering.svg"), NAME
    )


if __name__ == "__main__":
    sys.exit(main())
