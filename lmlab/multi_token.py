"""Multi-token prediction: pre-training of a model with several heads, or further training of one that has one."""

from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

from lmlab.core.errors import check
from lmlab.core.rng import key_for
from lmlab.core.types import Params
from lmlab.data.open import open_data
from lmlab.loading import Opened, check_same_tokens, open_model
from lmlab.models.config import ModelConfig
from lmlab.models.flops import further_heads_flops_per_token
from lmlab.models.heads import add_heads, drop_heads
from lmlab.models.rows import read_rows_with_heads
from lmlab.objectives.multi_token import multi_token
from lmlab.optim.chain import build_optimizer
from lmlab.optim.precision import cast_parameters
from lmlab.pretrain import compare, draw_continuations, with_vocabulary
from lmlab.recipe import MultiToken
from lmlab.runs import begun, build_heads
from lmlab.train.hosts import all_do
from lmlab.train.parallel import Share
from lmlab.train.state import State, new_state
from lmlab.training import Outcome, Pieces, train_run


def train_heads(config: MultiToken, folder: Path, profile: tuple[int, int] | None = None) -> Outcome:
    """Train what the recipe says into a run folder, or go on with the run that is there. See `train_run`."""
    build = partial(_begin, config, folder) if config.source else partial(heads_pieces, config)
    return train_run(config, folder, build, profile)


def heads_pieces(config: MultiToken, share: Share) -> Pieces:
    """The pieces of training with all heads; parameters are made anew. Raises `UserError` for what cannot be used."""
    data = open_data(config.data, lookahead=config.heads, **share._asdict())
    config = replace(config, model=with_vocabulary(config.model, data.tokenizer))
    model, loss = build_heads(config), config.objective
    reader = read_rows_with_heads(model, config.data.attend, config.data.positions)
    return Pieces(
        config=config,
        lm=model.lm,
        objective=multi_token(
            reader, head_weights=loss.head_weights, z_loss=loss.z_loss, chunk=loss.chunk,
            token_bytes_V=jnp.asarray(data.tokenizer.token_bytes_V),
        ),
        tx=build_optimizer(config.optim, model.lm.axes, config.train.steps, config.train.seed),
        data=data,
        sample=partial(draw_continuations, model.lm, data.tokenizer, config.eval),
        write=data.tokenizer.save,
        compare=partial(compare, config, data),
        further_flops=further_heads_flops_per_token(config.several, config.data.length),
    )  # fmt: skip


def _begin(config: MultiToken, folder: Path, share: Share) -> Pieces:
    """The pieces, with the parameters of the source under head 1; it is not read where the run goes on."""
    if was := begun(folder, MultiToken):
        return heads_pieces(_with_vocabulary_of(was.model, config), share)
    source = open_model(Path(config.source), config.model.execution, config.optim.parameters)
    pieces = heads_pieces(_with_vocabulary_of(source.config, config), share)
    resolved = pieces.config
    assert isinstance(resolved, MultiToken)
    _check_source(resolved, source)
    check_same_tokens(Path(config.source), source.text, pieces.data.tokenizer)

    def first_state(params: Params) -> State:
        key = jax.random.key(config.train.seed)
        params = add_heads(resolved.several, params, key_for(key, "heads"))
        return new_state(cast_parameters(params, config.optim.parameters), pieces.tx, key)

    def load(shardings: State) -> State:
        params = all_do(lambda: source.load(drop_heads(shardings.params)))
        return jax.jit(first_state, out_shardings=shardings)(params)

    return replace(pieces, load=load, origin=f"from {config.source}")


def _with_vocabulary_of(model: ModelConfig, config: MultiToken) -> MultiToken:
    vocab = config.model.vocab_size or model.vocab_size
    return replace(config, model=replace(config.model, vocab_size=vocab))


def _check_source(config: MultiToken, source: Opened) -> None:
    """Raise `UserError` unless the source is the model that head 1 is to be."""
    wanted, found = config.several.first, source.config
    free = {"execution"} if wanted.positions == "learned" else {"execution", "max_length"}
    check(type(wanted) is type(found), "model", type(wanted).__name__, f"{type(found).__name__}, as {config.source} is")
    for field in fields(wanted):
        ours, theirs = getattr(wanted, field.name), getattr(found, field.name)
        check(field.name in free or ours == theirs, f"model.{field.name} of head 1", ours,
              f"{theirs}, as in {config.source}",
              "Heads that are layers are the last ones of model.layers, so head 1's model has heads - 1 fewer."
              if field.name == "layers" else "")  # fmt: skip
