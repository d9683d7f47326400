"""A finished or interrupted run as something to use: its model, parameters and text, without its data."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import jax
from jax.sharding import NamedSharding, PartitionSpec

from lmlab.adapters import adapted, merge
from lmlab.core.errors import UserError
from lmlab.core.types import Params
from lmlab.interop.tokenizer_files import TokenizerFiles, read_tokenizer_files
from lmlab.interop.weights import Place, first_device
from lmlab.models.heads import multi_token_lm
from lmlab.models.lm import LM, MultiTokenLM
from lmlab.optim.config import LoraConfig
from lmlab.optim.precision import cast_parameters
from lmlab.policy import policy
from lmlab.recipe import SFT, MultiToken, Preference, Pretrain, ResolvedPreference, ResolvedSFT
from lmlab.train.checkpoint import finish, restore_params
from lmlab.train.folder import is_run, read_config
from lmlab.train.parallel import with_shardings
from lmlab.training import CHECKPOINTS, build_lm, load_checkpoints

R = TypeVar("R")


@dataclass(frozen=True)
class LoadedRun:
    """What a run folder holds."""

    config: Pretrain | ResolvedSFT | ResolvedPreference
    lm: LM
    step: int
    params: Params
    text: TokenizerFiles


@dataclass(frozen=True)
class LoadedHeads:
    """What the folder of a run with several heads holds."""

    config: MultiToken
    model: MultiTokenLM
    params: Params
    """Of all heads."""
    text: TokenizerFiles


def load_run(folder: Path, place: Place = first_device) -> LoadedRun:
    """Model and newest intact parameters of a run folder, in the type that they are trained in.

    Of a run with several heads it is head 1, and the others are not read. place: `place(lm, shapes) -> shardings` says
    where the parameters lie. Raises `UserError` if it holds none.
    """
    config = read_config(folder)
    lm = build_lm(alone(config))
    lora = config.lora if isinstance(config, SFT | Preference) else LoraConfig()
    kept = adapted(lm, lora)
    step, params = _read(folder, lm, kept, whole_model(config, lm), place)
    return LoadedRun(config, lm, step, merge(lm, lora, params), read_tokenizer_files(folder))


def load_whole(folder: Path) -> LoadedRun:
    """The same of a run of fine-tuning, with all that it keeps: adapters apart, and the copy of the source."""
    config = read_config(folder)
    lm = whole_model(config, build_lm(config))
    step, params = _read(folder, lm, lm, lm, first_device)
    return LoadedRun(config, lm, step, params, read_tokenizer_files(folder))


def whole_model(config: Any, lm: LM) -> LM:
    """The model with all that its run saves."""
    if isinstance(config, MultiToken):
        return build_heads(config).lm
    if isinstance(config, Preference):
        return policy(config, lm)
    return adapted(lm, config.lora) if isinstance(config, SFT) else lm


def _read(folder: Path, lm: LM, kept: LM, whole: LM, place: Place) -> tuple[int, Params]:
    """Step and parameters of `kept`: those of `lm`, and what a run adds to them. All are part of those of `whole`."""
    own, shapes, every = (jax.eval_shape(model.init, jax.random.key(0)) for model in (lm, kept, whole))
    shardings = place(lm, own)
    anywhere = jax.tree.leaves(shardings)[0]
    if isinstance(anywhere, NamedSharding):
        anywhere = NamedSharding(anywhere.mesh, PartitionSpec())
    added = {name: jax.tree.map(lambda _: anywhere, part) for name, part in shapes.items() if name not in own}
    unread = {name: leaf for name, leaf in every.items() if name not in shapes}
    return _newest(folder, with_shardings(shapes, {**shardings, **added}), unread)


def load_heads(folder: Path) -> LoadedHeads:
    """The same of a run with several heads, with all of them. Raises `UserError` for any other."""
    config = read_config(folder)
    if not isinstance(config, MultiToken):
        raise UserError("run folder", str(folder), "a run with several heads (a recipe MultiToken)")
    model = build_heads(config)
    shapes = jax.eval_shape(model.lm.init, jax.random.key(0))
    _, params = _newest(folder, with_shardings(shapes, first_device(model.lm, shapes)), {})
    return LoadedHeads(config, model, params, read_tokenizer_files(folder))


def has_saved(folder: Path) -> bool:
    """Whether a run folder holds a checkpoint."""
    return any(path.name.isdecimal() for path in (folder / CHECKPOINTS).glob("*"))


def begun(folder: Path, recipe: type[R]) -> R | None:
    """The config of a run of this kind of recipe that goes on from a checkpoint of its own; None: there is none here.

    Such a run needs nothing more of the model that it began as, which may be gone.
    """
    if not (has_saved(folder) and is_run(folder)):
        return None
    config = read_config(folder)
    return config if isinstance(config, recipe) else None


def alone(config: Pretrain | ResolvedSFT | ResolvedPreference) -> Pretrain | ResolvedSFT | ResolvedPreference:
    """The recipe, or of a run with several heads that of head 1: what the run is opened as."""
    if not isinstance(config, MultiToken):
        return config
    return Pretrain(config.several.first, config.data, optim=config.optim)


def build_heads(config: MultiToken) -> MultiTokenLM:
    """The model of a recipe with all heads; it makes its parameters in the type that they are trained in."""
    model = multi_token_lm(config.several)
    init = lambda key: cast_parameters(model.lm.init(key), config.optim.parameters)
    return replace(model, lm=replace(model.lm, init=init))


def _newest(folder: Path, like: Params, unread: Params) -> tuple[int, Params]:
    checkpoints = load_checkpoints(folder)
    restored = restore_params(checkpoints, like, unread)
    finish(checkpoints)
    if restored is None:
        raise UserError("run folder", str(folder), "a run that has saved a checkpoint", "Let it train on first.")
    return restored
