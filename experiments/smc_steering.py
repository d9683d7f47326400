"""SMC steering beside masked decoding and exact texts (arXiv 2306.03081).

    python -m experiments.smc_steering [--smoke] [--out FOLDER] [--model FOLDER_OR_GGUF]

First a model of bytes, 2 layers of width 64, which is trained on the sources and help texts of Python: no word may be
longer than 4 letters for 24 bytes. Rejection sampling gives exact texts and Z, the probability of the constraint.
Beside them masked decoding, importance sampling, standard SMC and SMC steering (K = 3), each with the plain proposal
and with the locally optimal one, by number of particles: how far log Z-hat lies below log Z, whether the mean of Z-hat
is Z, how probable the texts are, how their beginnings are spread, how many ancestors are left. All decode N rows a
round.

Then, if a model is named (a folder of transformers, a .gguf file, a run), a sentence that it has to end within so many
tokens under each of four constraints, after five prompts: the best of N unconstrained draws that happen to do; one
masked draw; the best of N masked ones; and one text by weight of importance sampling, standard SMC and steering, all
of N particles. The higher log Z-hat the better: by what its mean lacks of log Z the law of the text may differ from
that of exact ones (KL divergence, in nats; of a single masked draw it is that divergence).

Prints tables; writes results.json, smc_steering.svg and smc_prompts.svg. Expect ten minutes for the first part on two
shared CPU cores, and half an hour for the second with a model of 135M parameters. A small model that a run before has
left in the folder is used again.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import tyro

from experiments import smc_prompts
from experiments.results import carry_out
from experiments.smc_answers import draw_prompts, prompts_table
from experiments.smc_arms import ARMS
from experiments.smc_figures import draw_words, words_table
from experiments.smc_words import Sizes, run_words
from lmlab.cli import exit_code
from lmlab.core.errors import check
from lmlab.report.plots import drawing

NAME = "python -m experiments.smc_steering"
SMOKE = ("importance, optimal", "steering, plain")
"""Arms that are enough to see that it runs."""


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
    model: str = ""
    """A folder of transformers, a .gguf file or a run folder; empty: the second part is skipped."""
    only: Literal["", "words", "prompts"] = ""
    """words or prompts: the first or the second part alone."""
    model_seeds: int = 10
    """Runs of each arm after each prompt in the second part."""
    model_particles: int = 16
    """Particles there."""
    tokens: int = 32
    """That a sentence may have there."""


def run(options: Options) -> dict[str, Any]:
    """Both parts, or the one that is asked for."""
    least = {"steps": 1, "prompts": 1, "seeds": 2, "draws": 1, "model_seeds": 1, "model_particles": 1, "tokens": 1}
    for name, low in least.items():
        check(getattr(options, name) >= low, f"--{name.replace('_', '-')}", getattr(options, name), f"at least {low}")
    check(options.prompts <= 8, "--prompts", options.prompts, "at most 8")
    check(bool(options.particles) and min(options.particles) >= 1, "--particles", options.particles,
          "numbers of at least 1")  # fmt: skip
    check(options.only != "prompts" or bool(options.model), "--model", options.model, "a model, for its prompts")
    check(not options.model or Path(options.model).exists(), "--model", options.model, "an existing folder or file")
    if options.smoke:
        options = replace(options, steps=20, prompts=2, seeds=4, particles=(2,), draws=1024, model_seeds=2,
                          model_particles=4)  # fmt: skip
    result: dict[str, Any] = {"options": asdict(options)}
    if options.only != "prompts":
        sizes = Sizes(options.steps, options.prompts, options.seeds, options.particles, options.draws,
                      SMOKE if options.smoke else tuple(ARMS))  # fmt: skip
        result["words"] = run_words(Path(options.out), sizes)
    if options.model and options.only != "words":
        asked = smc_prompts.Sizes(options.model_seeds, options.model_particles, options.tokens)
        if options.smoke:
            asked = replace(asked, prompts=1, constraints=asked.constraints[:1], drivers=("importance", "steering"))
        result["prompts"] = smc_prompts.run_prompts(Path(options.model), asked)
    return result


def table(result: dict[str, Any]) -> str:
    """All that was found, as text."""
    tables = {"words": words_table, "prompts": prompts_table}
    shown = [tables[part](result[part]) for part in tables if part in result]
    return "\n".join(shown) + ("" if "prompts" in result else "\nprompts: skipped, no model was named (--model)")


def draw(result: dict[str, Any], path: Path) -> None:
    """Four panels of the small model, and in a figure of their own two of the other."""
    if "words" in result:
        with drawing(path, 11, 6.5) as drawn:
            draw_words(result["words"], drawn)
    if "prompts" in result:
        with drawing(path.with_name("smc_prompts.svg"), 10, 5) as drawn:
            draw_prompts(result["prompts"], drawn)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code, as `lmlab` does."""
    return exit_code(
        lambda: carry_out(tyro.cli(Options, prog=NAME, args=argv), run, draw, table, "smc_steering.svg"), NAME
    )


if __name__ == "__main__":
    sys.exit(main())
