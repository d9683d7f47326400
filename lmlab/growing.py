"""Growing: pre-training of a TokenFormer that begins as a smaller trained one (arXiv 2410.23168)."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import optax

from lmlab.core.errors import UserError, check
from lmlab.core.rng import key_for
from lmlab.core.types import Params
from lmlab.interop.tokenizer_files import read_tokenizer_files
from lmlab.loading import check_same_tokens
from lmlab.models.config import GrowthConfig, ParameterTokens, TokenFormerConfig
from lmlab.models.growth import check_growth, grow_params, grown_config
from lmlab.optim.chain import build_optimizer
from lmlab.optim.extend import extend_state
from lmlab.optim.precision import cast_parameters
from lmlab.pretrain import pretrain_pieces
from lmlab.recipe import Grown, MultiToken
from lmlab.runs import alone, begun, has_saved, load_run
from lmlab.train.checkpoint import finish, restore
from lmlab.train.folder import read_config
from lmlab.train.hosts import all_do
from lmlab.train.parallel import Share, abstract_state, param_shardings, state_shardings, with_shardings
from lmlab.train.state import State, new_state
from lmlab.training import Outcome, Pieces, build_lm, load_checkpoints, train_run


def grow(config: Grown, folder: Path, profile: tuple[int, int] | None = None) -> Outcome:
    """Train the source, grown to the model of the recipe, into a run folder, or go on there. See `train_run`.

    The new run begins at step 0 with the source's newest parameters. The recipe's model says how many parameter tokens
    there are to be and how it is computed; the rest of it has to be as in the source.
    """
    return train_run(config, folder, partial(_begin, config, folder), profile)


def _begin(config: Grown, folder: Path, share: Share) -> Pieces:
    """The pieces of pre-training, with what the source holds; it is not read where the run goes on.

    What can be refused is, before anything is written.
    """
    if was := begun(folder, Grown):
        pieces = pretrain_pieces(replace(config, model=_as_begun(was, config)), share)
        _check_source(folder, pieces)
        return pieces
    source = Path(config.source)
    old = read_config(source)
    small = _tokenformer(config.source, alone(old).model)
    config = replace(config, model=_large(small, config))
    pieces = pretrain_pieces(config, share)
    _check_source(source, pieces)
    several = isinstance(old, MultiToken) and config.growth.optimizer == "extend"
    check(not several, "--optimizer", "extend", "reset: of a run with several heads the first alone grows")
    lm = build_lm(alone(old))
    tx = build_optimizer(old.optim, lm.axes, old.train.steps, old.train.seed)
    shapes = abstract_state(lm.init, tx)
    grow = partial(grown_state, small=small, config=config, tx=pieces.tx)
    jax.eval_shape(grow, shapes.params, shapes.opt_state)
    places = state_shardings(shapes, param_shardings(lm.axes, shapes.params, jax.sharding.get_mesh()))
    read = partial(_read, source, with_shardings(shapes, places), config.growth)

    def load(shardings: State) -> State:
        return jax.jit(grow, out_shardings=shardings)(*all_do(read))

    return replace(pieces, load=load, origin=f"grown from {source}")


def grown_state(
    params: Params, opt_state: Any, small: TokenFormerConfig, config: Grown, tx: optax.GradientTransformation
) -> State:  # fmt: skip
    """The state of a run of `config` before its first step, from what a run of the small model holds. Pure.

    opt_state: read where it is to be extended alone. Raises `UserError` if it cannot be.
    """
    large = _tokenformer("the recipe", config.model)
    key = jax.random.key(config.train.seed)
    params = grow_params(params, small, large, key_for(key, "growth"), config.growth)
    fresh = new_state(cast_parameters(params, config.optim.parameters), tx, key)
    if config.growth.optimizer == "reset":
        return fresh
    return replace(fresh, opt_state=extend_state(opt_state, fresh.opt_state))


def _large(small: TokenFormerConfig, config: Grown) -> TokenFormerConfig:
    """The model that is asked for, with the vocabulary of the small one, and its tau where that is kept."""
    asked = _tokenformer("the recipe", config.model)
    reference = grown_config(small, asked.counts, config.growth).reference
    check(asked.reference in (ParameterTokens(), reference), "model.reference", asked.reference, repr(reference),
          "Growth decides what tau is (--tau): leave it out.")  # fmt: skip
    large = replace(asked, vocab_size=asked.vocab_size or small.vocab_size, reference=reference)
    check_growth(small, large)
    return large


def _as_begun(was: Grown, config: Grown) -> TokenFormerConfig:
    """The model that is asked for, with what the run has of its source."""
    asked, kept = _tokenformer("the recipe", config.model), _tokenformer("the run folder", was.model)
    reference = kept.reference if asked.reference == ParameterTokens() else asked.reference
    return replace(asked, vocab_size=asked.vocab_size or kept.vocab_size, reference=reference)


def _tokenformer(where: str, model: object) -> TokenFormerConfig:
    if not isinstance(model, TokenFormerConfig):
        raise UserError("model", f"{type(model).__name__} of {where}", "a TokenFormerConfig: only those grow")
    return model


def _check_source(source: Path, pieces: Pieces) -> None:
    check_same_tokens(source, read_tokenizer_files(source), pieces.data.tokenizer)
    check(has_saved(source), "run folder", str(source), "a run that has saved a checkpoint", "Let it train on first.")


def _read(source: Path, like: State, growth: GrowthConfig) -> tuple[Params, Any]:
    """The newest intact parameters of a run that has some, and the state of its optimiser if that is to be extended."""
    if growth.optimizer == "reset":
        return load_run(source, lambda lm, shapes: jax.tree.map(lambda leaf: leaf.sharding, like.params)).params, ()
    checkpoints = load_checkpoints(source)
    state = restore(checkpoints, like)
    finish(checkpoints)
    assert state is not None
    return state.params, state.opt_state
