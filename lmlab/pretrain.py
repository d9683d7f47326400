"""Pre-training put together: a recipe becomes a model, an objective, an optax chain and a stream, and the loop runs."""

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lmlab.core.errors import check
from lmlab.core.rng import key_for
from lmlab.core.serialize import to_json
from lmlab.core.types import Objective, Params
from lmlab.data.open import Data, open_data
from lmlab.data.tokenizers import TextTokenizer
from lmlab.evals.baselines import ngram_bits_per_byte, xz_bits_per_byte
from lmlab.evals.perplexity import make_held_out
from lmlab.inference.text import sample_text
from lmlab.models.config import TransformerConfig
from lmlab.models.flops import training_flops_per_token
from lmlab.models.lm import LM
from lmlab.models.transformer import transformer
from lmlab.objectives.next_token import next_token
from lmlab.optim.chain import build_optimizer
from lmlab.optim.precision import cast_parameters
from lmlab.recipe import EvalConfig, Pretrain
from lmlab.report.environment import describe_environment
from lmlab.report.metrics import MetricsLog, read_rows
from lmlab.report.page import write_report
from lmlab.report.profile import PROFILE, traced
from lmlab.report.progress import Progress
from lmlab.train.checkpoint import Checkpoints, finish, open_checkpoints, restore, save
from lmlab.train.device import peak_flops
from lmlab.train.folder import open_run, settle_config, write_json
from lmlab.train.hosts import agreement, all_do, first_does, is_first, same_everywhere
from lmlab.train.loop import Callbacks, Display, Log, Silent, Watch, fit
from lmlab.train.parallel import (
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
from lmlab.train.state import State, init_state
from lmlab.train.step import make_step

CHECKPOINTS, SAMPLES, BASELINES = "checkpoints", "samples.jsonl", "baselines.json"


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    folder: Path
    step: int
    stopped_by: str | None
    """Name of the signal that ended it early."""
    bits_per_byte: dict[str, float]
    """Of the model and what stands beside it, on all held-out text; empty if the run is not finished."""


def with_vocabulary(config: TransformerConfig, tokenizer: TextTokenizer) -> TransformerConfig:
    """The config with the tokenizer's vocabulary, or with its own if that is larger (padded to a round number)."""
    size = config.vocab_size or tokenizer.vocab_size
    check(size >= tokenizer.vocab_size, "model.vocab_size", size,
          f"at least {tokenizer.vocab_size}, or token ids would lie beyond the vocabulary", "0 takes what is needed."
          )  # fmt: skip
    return replace(config, vocab_size=size)


def build_lm(config: Pretrain) -> LM:
    """The model of a recipe; it makes its parameters in the type that they are trained in."""
    lm = transformer(config.model)
    return replace(lm, init=lambda key: cast_parameters(lm.init(key), config.optim.parameters))


def build_objective(config: Pretrain, lm: LM, tokenizer: TextTokenizer) -> Objective:
    """Next-token prediction that also counts bits per byte."""
    return next_token(
        lm, z_loss=config.objective.z_loss, chunk=config.objective.chunk,
        token_bytes_V=jnp.asarray(tokenizer.token_bytes_V),
    )  # fmt: skip


def pretrain(config: Pretrain, folder: Path, profile: tuple[int, int] | None = None) -> Outcome:
    """Train what the recipe says into a run folder, or go on with the run that is there.

    All processes of a job call it alike; the first one writes the files. The mesh may differ from the one that the
    run was begun on. profile: first and last step to trace; it changes nothing that is computed, and is no part of
    the recipe. Raises `UserError` for input that cannot be used; nothing that was written before is lost.
    """
    mesh = make_mesh(config.parallel)
    check_rows(mesh, config.data.batch_size, config.train.microbatches)
    with ExitStack() as stack:
        first_does(lambda: stack.enter_context(open_run(folder)))
        stack.enter_context(jax.set_mesh(mesh))
        data = all_do(lambda: open_data(config.data, lookahead=1, **row_share(mesh)._asdict()))
        config = replace(config, model=with_vocabulary(config.model, data.tokenizer))
        same_everywhere("recipe and data", f"{to_json(config)} {data.summary}")
        lm = build_lm(config)
        tx = build_optimizer(config.optim, lm.axes, config.train.steps, config.train.seed)
        shapes = abstract_state(lm.init, tx)
        shardings = state_shardings(shapes, param_shardings(lm.axes, shapes.params, mesh))
        if config.parallel.offload == "optimizer":
            shardings = offloaded(shardings)
        first_does(lambda: _settle(folder, config, data.tokenizer))

        keep = config.train.keep_last, config.train.keep_best
        checkpoints = all_do(lambda: open_checkpoints(folder / CHECKPOINTS, *keep))
        stack.callback(finish, checkpoints)
        restored = restore(checkpoints, with_shardings(shapes, shardings))
        state = restored or init_state(lm.init, tx, config.train.seed, shardings)
        start = int(state.step)
        log, display = all_do(lambda: _outputs(config, folder, start, stack))
        display.say(_opening(config, state, data))

        objective = build_objective(config, lm, data.tokenizer)
        place = partial(place_batch, mesh=mesh)
        held_out = lambda: map(place, data.heldout())
        key = key_for(state.key, "held-out")
        calls = Callbacks(
            log=log,
            display=display,
            evaluate=make_held_out(objective, held_out, key, config.eval.batches),
            sample=partial(draw_samples, lm, data.tokenizer, config.eval, folder, display.say),
            save=lambda state, score: save(checkpoints, state, {"steps": config.train.steps}, score),
            describe=data.train.documents_at,
            agree=agreement(),
            watch=profile and _profiler(*profile, start, folder, display.say),
            **_sizes(config),
        )
        step = traced_once(make_step(objective, tx, microbatches=config.train.microbatches))
        feed = lambda first: map(place, data.train.batches(first, None))
        state, stopped_by = fit(state, placed_step(step, shardings), feed, config.train, calls)
        measure = make_held_out(objective, held_out, key)
        scores = {} if stopped_by else all_do(lambda: compare(config, measure(state.params), data, folder))
        first_does(lambda: write_report(folder))
    return Outcome(folder, int(state.step), stopped_by, scores)


def _settle(folder: Path, config: Pretrain, tokenizer: TextTokenizer) -> None:
    """What a run folder holds before the first step. Where a run goes on, its config has to be the same."""
    settle_config(folder, config, free=("parallel",))
    write_json(folder / "environment.json", describe_environment())
    tokenizer.save(folder)


def _outputs(config: Pretrain, folder: Path, start: int, stack: ExitStack) -> tuple[Log, Display]:
    """Where rows and lines go; the other processes of a job keep silent."""
    if not is_first():
        return Silent(), Silent()
    _keep_samples(folder, start)
    return stack.enter_context(MetricsLog(folder, start)), stack.enter_context(Progress(config.train.steps, start))


def _sizes(config: Pretrain) -> dict[str, Any]:
    """What speed is measured by."""
    tokens = config.data.batch_size * config.data.length
    flops = training_flops_per_token(config.model, config.data.length) * tokens
    peak = peak_flops(config.model.execution.compute_dtype)
    return {"tokens_per_step": tokens, "flops_per_step": flops, "peak_flops": peak}


def _opening(config: Pretrain, state: State, data: Data) -> str:
    count, start = sum(leaf.size for leaf in jax.tree.leaves(state.params)), int(state.step)
    begun = f"resuming at step {start}" if start else "from scratch"
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


def draw_samples(
    lm: LM, tokenizer: TextTokenizer, config: EvalConfig, folder: Path, say: Callable[[str], None], step: int,
    params: Params,
) -> None:  # fmt: skip
    """Continue the prompts, show the first, and add all to `samples.jsonl`."""
    key = jax.random.key(0)
    texts = sample_text(lm, params, tokenizer, config.prompts, key, config.sampling)
    if not is_first():
        return
    with (folder / SAMPLES).open("a") as file:
        for prompt, (text, _) in zip(config.prompts, texts, strict=True):
            file.write(json.dumps({"step": step, "prompt": prompt, "text": text, "seed": 0}) + "\n")
    if texts:
        say(f"step {step}  sample\n{config.prompts[0]}{texts[0][0][:400]}")


def _keep_samples(folder: Path, step: int) -> None:
    """Drop samples drawn after the step that the run goes on from; they will be drawn again."""
    path = folder / SAMPLES
    if path.exists():
        kept = [json.dumps(row) for row in read_rows(path) if row["step"] <= step]
        partial_path = path.with_suffix(".partial")
        partial_path.write_text("".join(line + "\n" for line in kept))
        partial_path.replace(path)


def compare(config: Pretrain, held_out: Mapping[str, float], data: Data, folder: Path) -> dict[str, float]:
    """Bits per byte of the model on all held-out text, beside n-grams and xz; also in `baselines.json`.

    held_out: values of the model on all of that text.
    """
    scores = {"model": held_out["bits_per_byte"]}
    if is_first():
        if config.eval.baselines:
            texts = list(data.texts("heldout"))
            scores |= ngram_bits_per_byte(data.texts("train"), texts) | {"xz": xz_bits_per_byte(texts)}
        write_json(folder / BASELINES, scores)
    return scores


def load_checkpoints(folder: Path) -> Checkpoints:
    """The checkpoints of a run folder, for reading."""
    return open_checkpoints(folder / CHECKPOINTS)
