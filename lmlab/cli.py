"""The command line. JAX is imported inside the commands, so that help is there at once."""

import contextlib
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from lmlab.core.errors import UserError, check
from lmlab.inference.config import SamplingConfig
from lmlab.recipe import Pretrain, load_recipe
from lmlab.train.config import HostsConfig

RUNS = Path("runs")


@dataclass(frozen=True)
class Run:
    """Train what a recipe says; any field of it can be overridden. Run the same command again to go on."""

    recipe: tyro.conf.Positional[str]
    """A Python file with a function recipe(), or the name of one in ./configs."""
    out: str = ""
    """Run folder; empty: runs/NAME."""
    profile: str = ""
    """FIRST:LAST: trace these steps (profile/ in the run folder) and tell which operations took their time."""
    config: Annotated[Pretrain, tyro.conf.arg(name="")] = field(default_factory=Pretrain)
    hosts: HostsConfig = field(default_factory=HostsConfig)


@dataclass(frozen=True)
class Generate:
    """Continue texts with the model of a run folder."""

    run: tyro.conf.Positional[str]
    """Run folder."""
    prompt: tuple[str, ...] = ("",)
    """Beginnings of documents."""
    seed: int = 0
    """Seed of the samples."""
    sampling: Annotated[SamplingConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: SamplingConfig(temperature=0.8, top_p=0.95)
    )


@dataclass(frozen=True)
class Eval:
    """Measure the model of a run folder on all of its held-out text, beside n-grams and xz."""

    run: tyro.conf.Positional[str]
    """Run folder."""


@dataclass(frozen=True)
class Report:
    """Write report.html and the plots of a run folder anew."""

    run: tyro.conf.Positional[str]
    """Run folder."""


@dataclass(frozen=True)
class Plan:
    """Tell what a recipe needs and how long a step takes on devices that are not there; nothing is computed."""

    recipe: tyro.conf.Positional[str]
    """A Python file with a function recipe(), or the name of one in ./configs."""
    mesh: str = ""
    """DATAxFSDPxTENSOR or DATAxFSDPxCONTEXTxTENSOR, such as 8x4x2; empty: the recipe's."""
    chip: str = "v5e"
    """v4, v5e, v5p, v6e, a100, h100 or h200."""
    compiler: Literal["auto", "tpu", "cpu", "none"] = "auto"
    """tpu: libtpu compiles the step for the chip; cpu: this machine's compiler; none: the estimate alone; auto: tpu
    where libtpu is installed and makes programs for the chip, else none."""
    mfu: float = 0.4
    """Share of the peak that the step is assumed to reach while it computes."""
    config: Annotated[Pretrain, tyro.conf.arg(name="")] = field(default_factory=Pretrain)


@dataclass(frozen=True)
class Doctor:
    """Tell what this machine has: versions, devices, caches, and whether a computation works."""

    config: str = ""
    """A recipe: tell instead where its parameters lie on a mesh, which does not have to be there."""
    mesh: str = ""
    """DATAxFSDPxTENSOR or DATAxFSDPxCONTEXTxTENSOR, such as 8x4x2; empty: the recipe's."""


def run(args: Run) -> int:
    """Train; 0 when finished, 130 or 143 when interrupted by SIGINT or SIGTERM."""
    from lmlab.pretrain import pretrain
    from lmlab.report.profile import parse_steps
    from lmlab.train.hosts import is_first, join

    profile = parse_steps(args.profile, args.config.train.steps)
    check("://" not in args.out, "--out", args.out, "a folder of this machine", "Mount the bucket and name its folder.")
    join(args.hosts)
    folder = Path(args.out) if args.out else RUNS / Path(args.recipe).stem
    outcome = pretrain(args.config, folder, profile)
    if is_first() and outcome.bits_per_byte:
        print("\nheld-out bits per byte (lower is better)")
        for name, value in sorted(outcome.bits_per_byte.items(), key=lambda item: -item[1]):
            print(f"  {name:8s} {value:.3f}")
    if is_first():
        print(f"\nreport  {(outcome.folder / 'report.html').resolve()}")
    return 128 + signal.Signals[outcome.stopped_by] if outcome.stopped_by else 0


def generate(args: Generate) -> int:
    """Print each prompt with its continuation."""
    import jax

    from lmlab.inference.text import sample_text
    from lmlab.runs import load_run

    loaded = load_run(Path(args.run))
    key = jax.random.key(args.seed)
    drawn = sample_text(loaded.lm, loaded.params, loaded.tokenizer, args.prompt, key, args.sampling)
    for prompt, (text, _) in zip(args.prompt, drawn, strict=True):
        print(f"{prompt}{text}")
    return 0


def evaluate(args: Eval) -> int:
    """Print held-out values and what stands beside them."""
    from lmlab.runs import evaluate_run

    for name, value in evaluate_run(Path(args.run)).items():
        print(f"{name:16s} {value:.4f}")
    return 0


def report(args: Report) -> int:
    """Print where the report is."""
    from lmlab.report.page import write_report
    from lmlab.train.folder import read_config

    read_config(Path(args.run))
    print(write_report(Path(args.run)).resolve())
    return 0


def plan(args: Plan) -> int:
    """Print the plan. The devices of this machine are not touched: shapes are traced on its CPU."""
    import os

    os.environ["JAX_PLATFORMS"] = "cpu"
    from lmlab.plan.command import plan

    print(plan(args.config, args.mesh, args.chip, args.compiler, args.mfu))
    return 0


def shardings(args: Doctor) -> int:
    """Print where the parameters of a recipe lie."""
    import os

    os.environ["JAX_PLATFORMS"] = "cpu"
    from lmlab.plan.command import shardings

    print(shardings(load_recipe(args.config)[1], args.mesh))
    return 0


def doctor(args: Doctor) -> int:
    """Print versions and devices, and try a matmul on each device; or, of a recipe, the table of shardings."""
    if args.config:
        return shardings(args)
    if args.mesh:
        raise UserError("mesh", args.mesh, "a recipe beside it", "Add --config RECIPE.")
    import time

    import jax
    import jax.numpy as jnp

    from lmlab.core.runtime import cache_folder
    from lmlab.report.environment import describe_environment
    from lmlab.train.device import peak_flops

    for name, value in describe_environment().items():
        print(f"{name:20s} {value}")
    print(f"{'cache':20s} {cache_folder()}")
    for dtype in ("float32", "bfloat16"):
        x = jnp.ones((1024, 1024), dtype)
        square = jax.jit(lambda x: x @ x)
        square(x).block_until_ready()
        start = time.perf_counter()
        for _ in range(10):
            y = square(x)
        y.block_until_ready()
        rate = 10 * 2 * 1024**3 / (time.perf_counter() - start)
        peak = peak_flops(dtype)
        known = f"of {peak / 1e12:.0f}" if peak else "(peak not known)"
        print(f"{dtype + ' matmul':20s} {rate / 1e12:.3f} TFLOP/s {known}")
    return 0


COMMANDS: dict[str, tuple[type[Any], Callable[[Any], int]]] = {
    "run": (Run, run),
    "generate": (Generate, generate),
    "eval": (Eval, evaluate),
    "report": (Report, report),
    "plan": (Plan, plan),
    "doctor": (Doctor, doctor),
}


def usage() -> str:
    """What `lmlab --help` prints."""
    lines = [f"  {name:10s} {(kind.__doc__ or '').splitlines()[0]}" for name, (kind, _) in COMMANDS.items()]
    return "\n".join(
        ["usage: lmlab COMMAND ...", "", "Language-model research in JAX as pure functions that compose.", "",
         "commands:", *lines, "", "lmlab COMMAND --help tells its options; lmlab run RECIPE --help those of a recipe."]
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code: 0 done, 2 input that cannot be used, 130 or 143 interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(words)
    except UserError as error:
        print(f"lmlab: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("lmlab: interrupted; run the same command to go on", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output has left; Python would complain again at exit.
        with contextlib.suppress(OSError):
            sys.stdout = None
        return 141


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0
    if words[0] not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(words[0], COMMANDS, n=1)
        hint = f"Did you mean {near[0]}?" if near else "See lmlab --help."
        raise UserError("command", words[0], f"one of {', '.join(COMMANDS)}", hint)
    kind, command = COMMANDS[words[0]]
    default = None
    if kind in (Run, Plan) and len(words) > 1 and not words[1].startswith("-"):
        default = kind(words[1], config=load_recipe(words[1])[1])
    args = _parse(kind, words, default)
    if kind is not Report:
        from lmlab.core.runtime import prepare

        prepare()
    return command(args)


def _parse(kind: type[Any], words: list[str], default: Any) -> Any:
    options = {} if default is None else {"default": default}
    parsed = tyro.cli(kind, prog=f"lmlab {words[0]}", args=words[1:], config=(tyro.conf.AvoidSubcommands,), **options)
    return replace(parsed)


if __name__ == "__main__":
    sys.exit(main())
