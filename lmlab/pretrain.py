"""Pre-training put together: a recipe becomes a model, an objective, an optax chain and a stream, and the loop runs."""

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

from lmlab.core.errors import check
from lmlab.core.rng import key_for
from lmlab.core.types import Key, Objective, Params
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
from lmlab.report.progress import Progress
from lmlab.train.checkpoint import Checkpoints, finish, open_checkpoints, restore, save
from lmlab.train.device import peak_flops
from lmlab.train.folder import open_run, settle_config, write_json
from lmlab.train.loop import Callbacks, fit
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


def pretrain(config: Pretrain, folder: Path) -> Outcome:
    """Train what the recipe says into a run folder, or go on with the run that is there.

    Raises `UserError` for input that cannot be used; nothing that was written before is lost.
    """
    with open_run(folder), ExitStack() as stack:
        data = open_data(config.data, lookahead=1)
        config = replace(config, model=with_vocabulary(config.model, data.tokenizer))
        lm = build_lm(config)
        objective = build_objective(config, lm, data.tokenizer)
        tx = build_optimizer(config.optim, lm.axes, config.train.steps, config.train.seed)
        settle_config(folder, config)
        write_json(folder / "environment.json", describe_environment())
        data.tokenizer.save(folder)

        checkpoints = open_checkpoints(folder / CHECKPOINTS, config.train.keep_last, config.train.keep_best)
        stack.callback(finish, checkpoints)
        state = init_state(lm.init, tx, config.train.seed)
        state = restore(checkpoints, state) or state
        start = int(state.step)
        _keep_samples(folder, start)
        log = stack.enter_context(MetricsLog(folder, start))
        display = stack.enter_context(Progress(config.train.steps, start))
        display.say(_opening(config, state, data, start))

        key = key_for(state.key, "held-out")
        calls = Callbacks(
            log=log,
            display=display,
            evaluate=make_held_out(objective, data.heldout, key, config.eval.batches),
            sample=partial(draw_samples, lm, data.tokenizer, config.eval, folder, display.say),
            save=lambda state, held_out: save(checkpoints, state, {"steps": config.train.steps}, held_out),
            describe=data.train.documents_at,
            tokens_per_step=config.data.batch_size * config.data.length,
            flops_per_step=training_flops_per_token(config.model, config.data.length)
            * config.data.batch_size
            * config.data.length,
            peak_flops=peak_flops(config.model.execution.compute_dtype),
        )
        step = jax.jit(make_step(objective, tx, microbatches=config.train.microbatches), donate_argnums=0)
        state, stopped_by = fit(state, step, lambda first: data.train.batches(first, None), config.train, calls)
        scores = {} if stopped_by else compare(config, objective, data, state.params, key, folder)
    write_report(folder)
    return Outcome(folder, int(state.step), stopped_by, scores)


def _opening(config: Pretrain, state: State, data: Data, start: int) -> str:
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    begun = f"resuming at step {start}" if start else "from scratch"
    device = jax.devices()[0]
    return (
        f"{count / 1e6:.2f}M parameters, vocabulary {data.tokenizer.vocab_size}; {data.train.tokens / 1e6:.1f}M "
        f"training tokens; {config.train.steps} steps of {config.data.batch_size} x {config.data.length} tokens on "
        f"{jax.device_count()} {device.device_kind} device(s), {begun}"
    )


def draw_samples(
    lm: LM, tokenizer: TextTokenizer, config: EvalConfig, folder: Path, say: Callable[[str], None], step: int,
    params: Params,
) -> None:  # fmt: skip
    """Continue the prompts, show the first, and add all to `samples.jsonl`."""
    key = jax.random.key(0)
    texts = sample_text(lm, params, tokenizer, config.prompts, key, config.sampling)
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


def compare(
    config: Pretrain, objective: Objective, data: Data, params: Params, key: Key, folder: Path
) -> dict[str, float]:
    """Bits per byte of the model on all held-out text, beside n-grams and xz; also in `baselines.json`."""
    scores = {"model": make_held_out(objective, data.heldout, key)(params)["bits_per_byte"]}
    if config.eval.baselines:
        held_out = list(data.texts("heldout"))
        scores |= ngram_bits_per_byte(data.texts("train"), held_out) | {"xz": xz_bits_per_byte(held_out)}
    write_json(folder / BASELINES, scores)
    return scores


def load_checkpoints(folder: Path) -> Checkpoints:
    """The checkpoints of a run folder, for reading."""
    return open_checkpoints(folder / CHECKPOINTS)
