"""A training run of any method: the method builds its pieces; mesh, folder, checkpoints, logs and the loop are here."""

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import jax
import optax
from jax.sharding import Mesh

from lmlab.core.rng import key_for
from lmlab.core.serialize import to_json
from lmlab.core.types import Key, Objective, Params
from lmlab.data.open import Data
from lmlab.evals.perplexity import make_held_out
from lmlab.models.build import language_model
from lmlab.models.config import ModelConfig
from lmlab.models.flops import training_flops_per_token
from lmlab.models.lm import LM
from lmlab.optim.config import OptimConfig
from lmlab.optim.precision import cast_parameters
from lmlab.report.environment import describe_environment
from lmlab.report.metrics import MetricsLog, read_rows
from lmlab.report.page import write_report
from lmlab.report.profile import PROFILE, traced
from lmlab.report.progress import Progress
from lmlab.train.checkpoint import Checkpoints, finish, open_checkpoints, restore, save
from lmlab.train.config import ParallelConfig, TrainConfig
from lmlab.train.device import peak_flops
from lmlab.train.folder import open_run, settle_config, write_json
from lmlab.train.hosts import agreement, all_do, first_does, is_first, same_everywhere
from lmlab.train.loop import Callbacks, Display, Log, Silent, Watch, fit
from lmlab.train.parallel import (
    Share,
    abstract_state,
    check_rows,
    make_mesh,
    offloaded,
    param_shardings,
    place_batch,
    placed_step,
    row_share,
    state_shardings,
    with_shardings,
)
from lmlab.train.retrace import traced_once
from lmlab.train.state import State, Still, init_state
from lmlab.train.step import make_step

CHECKPOINTS, SAMPLES, BASELINES = "checkpoints", "samples.jsonl", "baselines.json"


class Rows(Protocol):
    """How large a batch is."""

    @property
    def batch_size(self) -> int:
        """B, over all hosts."""

    @property
    def length(self) -> int:
        """T."""


class Evaluation(Protocol):
    """What is measured on the way."""

    @property
    def batches(self) -> int:
        """Held-out batches of an evaluation during the run; 0: all."""


class Recipe(Protocol):
    """What every recipe says of a run, beside what is its own."""

    @property
    def data(self) -> Rows:
        """What is read."""

    @property
    def optim(self) -> OptimConfig:
        """How parameters are held, and what moves them."""

    @property
    def train(self) -> TrainConfig:
        """Length, rhythm and seed."""

    @property
    def parallel(self) -> ParallelConfig:
        """The mesh."""

    @property
    def eval(self) -> Evaluation:
        """What is measured."""


class Resolved(Recipe, Protocol):
    """A recipe that says all that the model can be built from; what a run folder keeps."""

    @property
    def model(self) -> ModelConfig:
        """The model, with the size of its vocabulary."""


@dataclass(frozen=True)
class Pieces:
    """What a method brings to a run."""

    config: Resolved
    lm: LM
    objective: Objective
    tx: optax.GradientTransformation
    data: Data
    sample: Callable[[Params, Key], list[tuple[str, str]]]
    """Draws what is to be shown: prompts, each with what the model makes of it."""
    write: Callable[[Path], None]
    """Writes into the run folder whatever the model needs beside its parameters: the tokenizer."""
    compare: Callable[[Mapping[str, float]], dict[str, float]] | None = None
    """From the values on all held-out data to bits per byte of the model and of what stands beside it; None: nothing
    is compared."""
    load: Callable[[State], State] | None = None
    """`load(shardings) -> state`: what a run begins with that has parameters already, laid out like that; None:
    `lm.init` makes them."""
    still: Still = ()
    """Parts of the parameters that do not move."""
    further_flops: float = 0.0
    """Floating-point operations of a token in training beside those of `config.model`."""
    origin: str = "from scratch"
    """Where the parameters come from, for the user."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    folder: Path
    step: int
    stopped_by: str | None
    """Name of the signal that ended it early."""
    bits_per_byte: dict[str, float]
    """Of the model and what stands beside it, on all held-out text; empty if the run is not finished."""


def build_lm(config: Resolved) -> LM:
    """The model of a recipe; it makes its parameters in the type that they are trained in."""
    lm = language_model(config.model)
    return replace(lm, init=lambda key: cast_parameters(lm.init(key), config.optim.parameters))


def train_run(
    config: Recipe, folder: Path, build: Callable[[Share], Pieces], profile: tuple[int, int] | None = None
) -> Outcome:
    """Train what `build` makes of the recipe into a run folder, or go on with the run that is there.

    All processes of a job call it alike; the first one writes the files. The mesh may differ from the one that the
    run was begun on. build: called on the mesh, with the part of the rows that this process feeds. profile: first and
    last step to trace; it changes nothing that is computed, and is no part of the recipe. Raises `UserError` for input
    that cannot be used; nothing that was written before is lost.
    """
    mesh = make_mesh(config.parallel)
    check_rows(mesh, config.data.batch_size, config.train.microbatches)
    with ExitStack() as stack:
        first_does(lambda: stack.enter_context(open_run(folder)))
        stack.enter_context(jax.set_mesh(mesh))
        pieces = all_do(lambda: build(row_share(mesh)))
        same_everywhere("recipe and data", f"{to_json(pieces.config)} {pieces.data.summary}")
        shapes, shardings = _layout(pieces, mesh)
        first_does(lambda: _settle(folder, pieces))
        keep = config.train.keep_last, config.train.keep_best
        checkpoints = all_do(lambda: open_checkpoints(folder / CHECKPOINTS, *keep))
        stack.callback(finish, checkpoints)
        state = restore(checkpoints, with_shardings(shapes, shardings)) or _first_state(pieces, shardings)
        start = int(state.step)
        log, display = all_do(lambda: _outputs(config.train.steps, folder, start, stack))
        display.say(_opening(pieces, state))

        place = partial(place_batch, mesh=mesh)
        held_out = lambda: map(place, pieces.data.heldout())
        key = key_for(state.key, "held-out")
        calls = Callbacks(
            log=log,
            display=display,
            evaluate=make_held_out(pieces.objective, held_out, key, config.eval.batches),
            sample=partial(draw_samples, pieces, folder, display.say),
            save=lambda state, score: save(checkpoints, state, {"steps": config.train.steps}, score),
            describe=pieces.data.train.documents_at,
            agree=agreement(),
            watch=profile and _profiler(*profile, start, folder, display.say),
            before=pieces.load is not None,
            **_sizes(pieces),
        )
        step = traced_once(make_step(pieces.objective, pieces.tx, microbatches=config.train.microbatches))
        feed = lambda first: map(place, pieces.data.train.batches(first, None))
        state, stopped_by = fit(state, placed_step(step, shardings), feed, config.train, calls)
        measure = make_held_out(pieces.objective, held_out, key)
        scores = {} if stopped_by else all_do(lambda: compare(pieces, lambda: measure(state.params), folder))
        first_does(lambda: write_report(folder))
    return Outcome(folder, int(state.step), stopped_by, scores)


def _layout(pieces: Pieces, mesh: Mesh) -> tuple[State, State]:
    """Shapes and types of the state, and where each of its arrays lies. Raises `UserError` for what does not divide."""
    shapes = abstract_state(pieces.lm.init, pieces.tx, pieces.still)
    shardings = state_shardings(shapes, param_shardings(pieces.lm.axes, shapes.params, mesh))
    return shapes, offloaded(shardings) if pieces.config.parallel.offload == "optimizer" else shardings


def _settle(folder: Path, pieces: Pieces) -> None:
    """What a run folder holds before the first step. Where a run goes on, its config has to be the same."""
    settle_config(folder, pieces.config, free=("parallel",))
    write_json(folder / "environment.json", describe_environment())
    pieces.write(folder)


def _first_state(pieces: Pieces, shardings: State) -> State:
    """The state of a new run: every process makes or reads what its devices hold and no more."""
    if pieces.load is not None:
        return pieces.load(shardings)
    return init_state(pieces.lm.init, pieces.tx, pieces.config.train.seed, shardings, pieces.still)


def _outputs(steps: int, folder: Path, start: int, stack: ExitStack) -> tuple[Log, Display]:
    """Where rows and lines go; the other processes of a job keep silent."""
    if not is_first():
        return Silent(), Silent()
    # A run that begins writes its row of step 0 anew.
    kept = start or -1
    _keep_samples(folder, kept)
    return stack.enter_context(MetricsLog(folder, kept)), stack.enter_context(Progress(steps, start))


def _sizes(pieces: Pieces) -> dict[str, Any]:
    """What speed is measured by."""
    config = pieces.config
    tokens = config.data.batch_size * config.data.length
    flops = (training_flops_per_token(config.model, config.data.length) + pieces.further_flops) * tokens
    peak = peak_flops(config.model.execution.compute_dtype)
    return {"tokens_per_step": tokens, "flops_per_step": flops, "peak_flops": peak}


def _opening(pieces: Pieces, state: State) -> str:
    config, data = pieces.config, pieces.data
    count, start = sum(leaf.size for leaf in jax.tree.leaves(state.params)), int(state.step)
    begun = f"resuming at step {start}" if start else pieces.origin
    mesh = jax.sharding.get_mesh()
    parts = " x ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1)
    device = f"{mesh.size} {mesh.devices.flat[0].device_kind} device(s)" + (f" ({parts})" if parts else "")
    return (
        f"{count / 1e6:.2f}M parameters, vocabulary {data.tokenizer.vocab_size}; {data.train.tokens / 1e6:.1f}M "
        f"training tokens; {config.train.steps} steps of {config.data.batch_size} x {config.data.length} tokens on "
        f"{device}, {begun}"
    )


def _profiler(first: int, last: int, start: int, folder: Path, say: Callable[[str], None]) -> Watch:
    if start >= last:
        say(f"nothing is profiled: the run has already made steps {first} to {last}")
    return Watch(first, last, partial(traced, folder / PROFILE, say))


def draw_samples(pieces: Pieces, folder: Path, say: Callable[[str], None], step: int, params: Params) -> None:
    """Draw samples, show the first, and add all to `samples.jsonl`."""
    drawn = pieces.sample(params, jax.random.key(0))
    if not is_first():
        return
    with (folder / SAMPLES).open("a") as file:
        for prompt, text in drawn:
            file.write(json.dumps({"step": step, "prompt": prompt, "text": text, "seed": 0}) + "\n")
    if drawn:
        prompt, text = drawn[0]
        say(f"step {step}  sample\n{prompt}{text[:400]}")


def _keep_samples(folder: Path, step: int) -> None:
    """Drop samples drawn after the step that the run goes on from; they will be drawn again."""
    path = folder / SAMPLES
    if path.exists():
        kept = [json.dumps(row) for row in read_rows(path) if row["step"] <= step]
        partial_path = path.with_suffix(".partial")
        partial_path.write_text("".join(line + "\n" for line in kept))
        partial_path.replace(path)


def compare(pieces: Pieces, measure: Callable[[], Mapping[str, float]], folder: Path) -> dict[str, float]:
    """What the method compares the model with, also in `baselines.json`. measure: values on all held-out data."""
    if pieces.compare is None:
        return {}
    scores = pieces.compare(measure())
    if is_first():
        write_json(folder / BASELINES, scores)
    return scores


def load_checkpoints(folder: Path) -> Checkpoints:
    """The checkpoints of a run folder, for reading."""
    return open_checkpoints(folder / CHECKPOINTS)
