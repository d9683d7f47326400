"""Growing: pre-training of a TokenFormer that begins as a smaller trained one (arXiv 2410.23168)."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import optax

from lmlab.core.errors import UserError, check
from lmlab.core.rng import key_for
from lmlab.interop.tokenizer_files import read_tokenizer_files
from lmlab.models.config import ParameterTokens, TokenFormerConfig
from lmlab.models.growth import check_growth, grow_params, grown_config
from lmlab.optim.chain import build_optimizer
from lmlab.optim.extend import extend_state
from lmlab.optim.precision import cast_parameters
from lmlab.pretrain import pretrain_pieces
from lmlab.recipe import Grown
from lmlab.train.checkpoint import finish, restore
from lmlab.train.folder import read_config
from lmlab.train.hosts import all_do
from lmlab.train.parallel import Share, abstract_state, param_shardings, state_shardings, with_shardings
from lmlab.train.state import State, new_state
from lmlab.training import CHECKPOINTS, Outcome, Pieces, build_lm, load_checkpoints, train_run


def grow(config: Grown, folder: Path, profile: tuple[int, int] | None = None) -> Outcome:
    """Train the source, grown to the model of the recipe, into a run folder, or go on there. See `train_run`.

    The new run begins at step 0 with the source's newest parameters. The recipe's model says how many parameter tokens
    there are to be and how it is computed; the rest of it has to be as in the source.
    """
    return train_run(config, folder, partial(_begin, config), profile)


def _begin(config: Grown, share: Share) -> Pieces:
    """The pieces of pre-training, with the state of the source. What can be refused is, before it is read."""
    source = Path(config.source)
    old = read_config(source)
    small = _tokenformer(config.source, old.model)
    config = replace(config, model=_large(small, config))
    pieces = pretrain_pieces(config, share)
    _check_source(source, pieces)
    lm = build_lm(old)
    tx = build_optimizer(old.optim, lm.axes, old.train.steps, old.train.seed)
    shapes = abstract_state(lm.init, tx)
    grow = partial(grown_state, small=small, config=config, tx=pieces.tx)
    jax.eval_shape(grow, shapes)
    places = param_shardings(lm.axes, shapes.params, jax.sharding.get_mesh())

    def load(shardings: State) -> State:
        state = all_do(lambda: _newest(source, with_shardings(shapes, state_shardings(shapes, places))))
        return jax.jit(grow, out_shardings=shardings)(state)

    return replace(pieces, load=load, origin=f"grown from {source}")


def grown_state(state: State, small: TokenFormerConfig, config: Grown, tx: optax.GradientTransformation) -> State:
    """The state of a run of `config` before its first step, from that of a run of the small model. Pure.

    Raises `UserError` where the state of another optimiser is to be extended.
    """
    large = _tokenformer("the recipe", config.model)
    key = jax.random.key(config.train.seed)
    params = grow_params(state.params, small, large, key_for(key, "growth"), config.growth)
    fresh = new_state(cast_parameters(params, config.optim.parameters), tx, key)
    if config.growth.optimizer == "reset":
        return fresh
    return replace(fresh, opt_state=extend_state(state.opt_state, fresh.opt_state))


def _large(small: TokenFormerConfig, config: Grown) -> TokenFormerConfig:
    """The model that is asked for, with the vocabulary of the small one, and its tau where that is kept."""
    asked = _tokenformer("the recipe", config.model)
    reference = grown_config(small, asked.counts, config.growth).reference
    check(asked.reference in (ParameterTokens(), reference), "model.reference", asked.reference, repr(reference),
          "Growth decides what tau is (--tau): leave it out.")  # fmt: skip
    large = replace(asked, vocab_size=asked.vocab_size or small.vocab_size, reference=reference)
    check_growth(small, large)
    return large


def _tokenformer(where: str, model: object) -> TokenFormerConfig:
    if not isinstance(model, TokenFormerConfig):
        raise UserError("model", f"{type(model).__name__} of {where}", "a TokenFormerConfig: only those grow")
    return model


def _check_source(source: Path, pieces: Pieces) -> None:
    trained = read_tokenizer_files(source).tokenizer
    check(trained.fingerprint == pieces.data.tokenizer.fingerprint, "data.tokenizer", "another tokenizer",
          f"that of {source}, whose tokens the model has learnt",
          f"Train on the same data, or name the file: TokenizerFile({str(source / 'tokenizer.json')!r}).")  # fmt: skip
    saved = any(path.name.isdecimal() for path in (source / CHECKPOINTS).glob("*"))
    check(saved, "run folder", str(source), "a run that has saved a checkpoint", "Let it train on first.")


def _newest(source: Path, like: State) -> State:
    """The newest intact state of a run that has one."""
    checkpoints = load_checkpoints(source)
    state = restore(checkpoints, like)
    finish(checkpoints)
    assert state is not None
    return state
