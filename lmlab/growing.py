"""From the run of a TokenFormer to one of a larger one, which begins where the smaller one stands."""

from dataclasses import replace
from pathlib import Path

import jax

from lmlab.core.errors import UserError, check
from lmlab.core.rng import key_for
from lmlab.data.tokenizers import load_tokenizer
from lmlab.models.config import GrowthConfig, TokenFormerConfig
from lmlab.models.growth import grow_params, grown_config
from lmlab.optim.chain import build_optimizer
from lmlab.optim.extend import extend_state
from lmlab.optim.precision import cast_parameters
from lmlab.recipe import Pretrain
from lmlab.train.checkpoint import finish, restore, save
from lmlab.train.folder import is_run, open_run, read_config, settle_config
from lmlab.train.parallel import abstract_state, with_shardings
from lmlab.train.state import State, new_state
from lmlab.training import build_lm, load_checkpoints


def grow_run(source: Path, recipe: Pretrain, folder: Path, growth: GrowthConfig | None = None) -> Pretrain:
    """Begin the run of a recipe with the newest state of a smaller run, grown; its config, as the new folder keeps it.

    `pretrain(config, folder)` then trains it. The recipe's model says how many parameter tokens there are to be and
    how it is computed; where tau is kept, `reference` becomes that of the source. growth: how; None: the paper's way.
    Raises `UserError` for models that do not grow into each other, and where the folder holds a run.
    """
    growth = growth or GrowthConfig()
    check(not is_run(folder), "run folder", str(folder), "one that holds no run", "Choose another.")
    old = read_config(source)
    small = _tokenformer(str(source), old.model)
    asked = _tokenformer("the recipe", recipe.model)
    large = replace(
        asked, vocab_size=asked.vocab_size or small.vocab_size,
        reference=grown_config(small, asked.counts, growth).reference,
    )  # fmt: skip
    config = replace(recipe, model=large)
    state = grow_state(_newest_state(source, old), small, config, growth)
    with open_run(folder):
        checkpoints = load_checkpoints(folder)
        save(checkpoints, state, {"steps": config.train.steps})
        finish(checkpoints)
        load_tokenizer(source).save(folder)
        settle_config(folder, config)
    return config


def grow_state(state: State, small: TokenFormerConfig, config: Pretrain, growth: GrowthConfig) -> State:
    """The state of a run of `config` before its first step, from the state of a run of the smaller model."""
    lm, large = build_lm(config), _tokenformer("the recipe", config.model)
    tx = build_optimizer(config.optim, lm.axes, config.train.steps, config.train.seed)
    key = jax.random.key(config.train.seed)
    params = grow_params(state.params, small, large, key_for(key, "growth"), growth)
    fresh = new_state(cast_parameters(params, config.optim.parameters), tx, key)
    if growth.optimizer == "reset":
        return fresh
    return replace(fresh, opt_state=extend_state(state.opt_state, fresh.opt_state))


def _tokenformer(where: str, model: object) -> TokenFormerConfig:
    if not isinstance(model, TokenFormerConfig):
        raise UserError("model", f"{type(model).__name__} of {where}", "a TokenFormerConfig: only those grow")
    return model


def _newest_state(source: Path, config: Pretrain) -> State:
    lm = build_lm(config)
    tx = build_optimizer(config.optim, lm.axes, config.train.steps, config.train.seed)
    shapes = abstract_state(lm.init, tx)
    first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    checkpoints = load_checkpoints(source)
    state = restore(checkpoints, with_shardings(shapes, jax.tree.map(lambda _: first, shapes)))
    finish(checkpoints)
    if state is None:
        raise UserError("run folder", str(source), "a run that has saved a checkpoint", "Let it train on first.")
    return state
