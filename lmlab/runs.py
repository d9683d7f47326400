"""A finished or interrupted run as something to use: its model, parameters and text, without its data."""

from dataclasses import dataclass
from pathlib import Path

import jax

from lmlab.core.errors import UserError
from lmlab.core.types import Params
from lmlab.interop.tokenizer_files import TokenizerFiles, read_tokenizer_files
from lmlab.interop.weights import Place, first_device
from lmlab.models.lm import LM
from lmlab.recipe import Pretrain, ResolvedSFT
from lmlab.train.checkpoint import finish, restore_params
from lmlab.train.folder import read_config
from lmlab.train.parallel import with_shardings
from lmlab.training import build_lm, load_checkpoints


@dataclass(frozen=True)
class LoadedRun:
    """What a run folder holds."""

    config: Pretrain | ResolvedSFT
    lm: LM
    step: int
    params: Params
    text: TokenizerFiles


def load_run(folder: Path, place: Place = first_device) -> LoadedRun:
    """Model and newest intact parameters of a run folder, in the type that they are trained in.

    place: `place(lm, shapes) -> shardings` says where the parameters lie. Raises `UserError` if it holds none.
    """
    config = read_config(folder)
    lm = build_lm(config)
    shapes = jax.eval_shape(lm.init, jax.random.key(0))
    checkpoints = load_checkpoints(folder)
    restored = restore_params(checkpoints, with_shardings(shapes, place(lm, shapes)))
    finish(checkpoints)
    if restored is None:
        raise UserError("run folder", str(folder), "a run that has saved a checkpoint", "Let it train on first.")
    return LoadedRun(config, lm, *restored, read_tokenizer_files(folder))
