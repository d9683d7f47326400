"""Pre-training: a recipe becomes a model, next-token prediction, an optax chain and a stream of documents."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax.numpy as jnp

from lmlab.core.errors import check
from lmlab.core.types import Key, Objective, Params
from lmlab.data.open import Data, open_data
from lmlab.data.tokenizers import TextTokenizer
from lmlab.evals.baselines import ngram_bits_per_byte, xz_bits_per_byte
from lmlab.inference.text import sample_text
from lmlab.models.config import ModelConfig
from lmlab.models.lm import LM
from lmlab.models.rows import read_rows
from lmlab.objectives.config import NextTokenConfig
from lmlab.objectives.next_token import next_token
from lmlab.optim.chain import build_optimizer
from lmlab.recipe import ChatEvalConfig, EvalConfig, Pretrain
from lmlab.train.hosts import is_first
from lmlab.train.parallel import Share
from lmlab.training import Outcome, Pieces, build_lm, train_run


def pretrain(config: Pretrain, folder: Path, profile: tuple[int, int] | None = None) -> Outcome:
    """Train what the recipe says into a run folder, or go on with the run that is there. See `train_run`."""
    return train_run(config, folder, partial(pretrain_pieces, config), profile)


def pretrain_pieces(config: Pretrain, share: Share) -> Pieces:
    """The pieces of pre-training. Raises `UserError` for text or sizes that cannot be used."""
    data = open_data(config.data, lookahead=1, **share._asdict())
    config = replace(config, model=with_vocabulary(config.model, data.tokenizer))
    lm = build_lm(config)
    return Pieces(
        config=config,
        lm=lm,
        objective=build_objective(
            config.objective, read_rows(lm, config.data.attend, config.data.positions), data.tokenizer
        ),
        tx=build_optimizer(config.optim, lm.axes, config.train.steps, config.train.seed),
        data=data,
        sample=partial(draw_continuations, lm, data.tokenizer, config.eval),
        write=data.tokenizer.save,
        compare=partial(compare, config, data),
    )


def with_vocabulary(config: ModelConfig, tokenizer: TextTokenizer) -> ModelConfig:
    """The config with the tokenizer's vocabulary, or with its own if that is larger (padded to a round number)."""
    size = config.vocab_size or tokenizer.vocab_size
    check(size >= tokenizer.vocab_size, "model.vocab_size", size,
          f"at least {tokenizer.vocab_size}, or token ids would lie beyond the vocabulary", "0 takes what is needed."
          )  # fmt: skip
    return replace(config, vocab_size=size)


def build_objective(config: NextTokenConfig, lm: LM, tokenizer: TextTokenizer) -> Objective:
    """Next-token prediction that also counts bits per byte."""
    return next_token(
        lm, z_loss=config.z_loss, chunk=config.chunk, token_bytes_V=jnp.asarray(tokenizer.token_bytes_V)
    )  # fmt: skip


def draw_continuations(
    lm: LM, tokenizer: TextTokenizer, config: EvalConfig | ChatEvalConfig, params: Params, key: Key
) -> list[tuple[str, str]]:
    """The prompts, each with a continuation."""
    texts = sample_text(lm, params, tokenizer, config.prompts, key, config.sampling)
    return [(prompt, text) for prompt, (text, _) in zip(config.prompts, texts, strict=True)]


def compare(config: Pretrain, data: Data, held_out: Mapping[str, float]) -> dict[str, float]:
    """Bits per byte of the model on all held-out text, beside n-grams and xz.

    held_out: values of the model on all of that text.
    """
    scores = {"model": held_out["bits_per_byte"]}
    if is_first() and config.eval.baselines:
        texts = list(data.texts("heldout"))
        scores |= ngram_bits_per_byte(data.texts("train"), texts) | {"xz": xz_bits_per_byte(texts)}
    return scores
