"""The commands of the command line: options, what they do. JAX is imported inside, so that help is there at once."""

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from lmlab.core.errors import check
from lmlab.inference.config import SamplingConfig, Verify
from lmlab.label_noise.command import label_noise
from lmlab.label_noise.config import LabelNoise
from lmlab.models.config import GrowthConfig
from lmlab.ordering import Order, order
from lmlab.recipe import RUNS, Grown, MultiToken, Pretrain, load_recipe
from lmlab.steering.command import steer
from lmlab.steering.config import Steer
from lmlab.train.config import HostsConfig


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
class Grow:
    """Train a TokenFormer that begins as a smaller trained one; its recipe's fields, too. Run it again to go on.

    By default as the paper does: the new model computes what the old one does. --keys normal --tau follow: as the
    authors' code does.
    """

    run: tyro.conf.Positional[str]
    """Run folder of the model that grows."""
    to: str
    """The recipe of the larger one: a Python file with a function recipe(), or the name of one in ./configs."""
    out: str = ""
    """Run folder; empty: runs/NAME."""
    profile: str = ""
    """FIRST:LAST: trace these steps (profile/ in the run folder) and tell which operations took their time."""
    growth: Annotated[GrowthConfig, tyro.conf.arg(name="")] = field(default_factory=GrowthConfig)
    config: Annotated[Pretrain, tyro.conf.arg(name="")] = field(default_factory=Pretrain)
    hosts: HostsConfig = field(default_factory=HostsConfig)


@dataclass(frozen=True)
class Generate:
    """Continue texts with any model, or talk with it."""

    model: tyro.conf.Positional[str]
    """Run folder, folder of transformers (config.json, safetensors), .gguf file, or .bin of llama2.c."""
    prompt: tuple[str, ...] = ("",)
    """Beginnings of documents, or with --chat what is said first."""
    chat: bool = False
    """Talk in the terminal, as the model's chat template says; with --prompt it answers each once and ends."""
    system: str = ""
    """With --chat: the system message."""
    samples: int = 1
    """Continuations of each prompt."""
    draft: str = ""
    """A smaller model of the same tokenizer that drafts (speculative decoding); what is drawn stays as probable."""
    ahead: int = 4
    """Tokens that it drafts at once."""
    heads: int = 0
    """Of a run with several heads: decode with so many, of which all but the first draft; 0: with the first alone."""
    verify: Verify = "token"
    """With --draft or --heads, keep drafted tokens one by one, or as many of the draft as can be (a few more)."""
    seed: int = 0
    """Seed of the samples."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the parameters, except those of a run, which keep theirs."""
    sampling: Annotated[SamplingConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: SamplingConfig(temperature=0.8, top_p=0.95)
    )


@dataclass(frozen=True)
class Eval:
    """Measure a run on its held-out text beside n-grams and xz, or any model on texts or tasks."""

    model: tyro.conf.Positional[str]
    """Run folder, folder of transformers, .gguf file, or .bin of llama2.c."""
    texts: tuple[str, ...] = ()
    """Text files: perplexity and bits per byte of each as one text."""
    tasks: tuple[str, ...] = ()
    """Tasks of EleutherAI's lm-evaluation-harness, by name or as .yaml files (needs the extra `harness`)."""
    limit: int = 0
    """Items of each task; 0: all."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the parameters, except those of a run, which keep theirs."""


@dataclass(frozen=True)
class Convert:
    """Write any model as a folder of transformers: config.json, safetensors, tokenizer."""

    source: tyro.conf.Positional[str]
    """Run folder, folder of transformers, .gguf file, or .bin of llama2.c."""
    target: tyro.conf.Positional[str]
    """The folder to write; it must not exist, or be empty."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the weights in it."""


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
    """Train; the exit code is that of `train`."""
    from lmlab.multi_token import train_heads
    from lmlab.pretrain import pretrain

    config, name = args.config, Path(args.recipe).stem
    check(not isinstance(config, Grown), "recipe", args.recipe, "a recipe Pretrain or MultiToken, not Grown",
          "A model grows by lmlab grow RUN --to RECIPE, where the recipe is a Pretrain.")  # fmt: skip
    method = partial(train_heads, config) if isinstance(config, MultiToken) else partial(pretrain, config)
    return train(method, config.train.steps, args.out or str(RUNS / name), args.profile, args.hosts)


def grow(args: Grow) -> int:
    """Grow, then train; the exit code is that of `train`."""
    from lmlab.growing import grow

    check(type(args.config) is Pretrain, "--to", args.to, "a recipe Pretrain: only models of one head grow")
    config = Grown(**vars(args.config), source=args.run, growth=args.growth)
    out = args.out or str(RUNS / Path(args.to).stem)
    return train(partial(grow, config), config.train.steps, out, args.profile, args.hosts)


def train(method: Callable[[Path, Any], Any], steps: int, out: str, profile: str, hosts: HostsConfig) -> int:
    """Let a method train into the folder `out`; 0 when finished, 130 or 143 when interrupted by SIGINT or SIGTERM.

    method: `method(folder, profile) -> Outcome`.
    """
    from lmlab.report.profile import parse_steps
    from lmlab.train.hosts import is_first, join

    traced = parse_steps(profile, steps)
    check("://" not in out, "--out", out, "a folder of this machine", "Mount the bucket and name its folder.")
    join(hosts)
    outcome = method(Path(out), traced)
    if is_first() and outcome.bits_per_byte:
        print("\nheld-out bits per byte (lower is better)")
        for name, value in sorted(outcome.bits_per_byte.items(), key=lambda item: -item[1]):
            print(f"  {name:8s} {value:.3f}")
    if is_first():
        print(f"\nreport  {(outcome.folder / 'report.html').resolve()}")
    return 128 + signal.Signals[outcome.stopped_by] if outcome.stopped_by else 0


def generate(args: Generate) -> int:
    """Print each prompt with its continuations, or talk."""
    import jax

    from lmlab.inference.text import sample_text
    from lmlab.interop.pretrained import tokenizer_of
    from lmlab.loading import load_model
    from lmlab.runs import load_heads
    from lmlab.talk import draft_text, heads_text, talk

    check(args.samples >= 1, "samples", args.samples, "at least 1")
    check(not args.chat or not args.draft, "--draft", args.draft, "no draft model with --chat")
    check(not args.heads or not (args.draft or args.chat), "--heads", args.heads, "neither --draft nor --chat with it")
    key, prompts = jax.random.key(args.seed), [prompt for prompt in args.prompt for _ in range(args.samples)]
    if args.heads:
        texts = heads_text(load_heads(Path(args.model)), prompts, key, args.sampling, args.heads, args.verify)
    else:
        model = load_model(Path(args.model), args.dtype)
        if args.chat:
            talk(model, [prompt for prompt in args.prompt if prompt], args.system, key, args.sampling)
            return 0
        if args.draft:
            how = key, args.sampling, args.ahead, args.verify
            texts = draft_text(model, load_model(Path(args.draft), args.dtype), prompts, *how)
        else:
            drawn = sample_text(model.lm, model.params, tokenizer_of(model), prompts, key, args.sampling)
            texts = [text for text, _ in drawn]
    for prompt, text in zip(prompts, texts, strict=True):
        print(f"{prompt}{text}")
    return 0


def evaluate(args: Eval) -> int:
    """Print values and what stands beside them."""
    from lmlab.evaluation import evaluate_run, evaluate_tasks, evaluate_texts

    model = Path(args.model)
    values = evaluate_tasks(model, args.tasks, args.limit, args.dtype) if args.tasks else {}
    values |= evaluate_texts(model, args.texts, args.dtype) if args.texts else {}
    values |= {} if args.tasks or args.texts else evaluate_run(model)
    for name, value in values.items():
        print(f"{name:24s} {value:.4f}")
    return 0


def convert(args: Convert) -> int:
    """Write the folder."""
    from lmlab.loading import export

    export(Path(args.source), Path(args.target), args.dtype)
    print(Path(args.target).resolve())
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
    os.environ["JAX_PLATFORMS"] = "cpu"
    from lmlab.plan.command import plan

    print(plan(args.config, args.mesh, args.chip, args.compiler, args.mfu))
    return 0


def doctor(args: Doctor) -> int:
    """Print versions and devices, and try a matmul on each device; or, of a recipe, the table of shardings."""
    check(bool(args.config) or not args.mesh, "mesh", args.mesh, "a recipe beside it", "Add --config RECIPE.")
    if args.config:
        os.environ["JAX_PLATFORMS"] = "cpu"
        from lmlab.plan.command import shardings

        print(shardings(load_recipe(args.config)[1], args.mesh))
        return 0
    from lmlab.doctor import findings

    for line in findings():
        print(line)
    return 0


COMMANDS: dict[str, tuple[type[Any], Callable[[Any], int]]] = {
    "run": (Run, run),
    "grow": (Grow, grow),
    "generate": (Generate, generate),
    "steer": (Steer, steer),
    "eval": (Eval, evaluate),
    "convert": (Convert, convert),
    "report": (Report, report),
    "order": (Order, order),
    "label-noise": (LabelNoise, label_noise),
    "plan": (Plan, plan),
    "doctor": (Doctor, doctor),
}
