"""A finished or interrupted run as something to use: its model, parameters and tokenizer, without its data."""

from dataclasses import dataclass
from pathlib import Path

import jax

from lmlab.core.errors import UserError
from lmlab.core.rng import key_for
from lmlab.core.types import Params
from lmlab.data.tokenizers import TextTokenizer, load_tokenizer
from lmlab.evals.perplexity import make_held_out
from lmlab.models.lm import LM
from lmlab.pretrain import build_pieces
from lmlab.recipe import Pretrain
from lmlab.train.checkpoint import finish, restore_params
from lmlab.train.folder import read_config
from lmlab.train.parallel import Share
from lmlab.training import build_lm, compare, load_checkpoints


@dataclass(frozen=True)
class LoadedRun:
    """What a run folder holds."""

    config: Pretrain
    lm: LM
    step: int
    params: Params
    tokenizer: TextTokenizer


def load_run(folder: Path) -> LoadedRun:
    """Model and newest intact parameters of a run folder. Raises `UserError` if it holds none."""
    config = read_config(folder)
    lm = build_lm(config)
    like = jax.eval_shape(lm.init, jax.random.key(0))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), like)
    checkpoints = load_checkpoints(folder)
    restored = restore_params(checkpoints, like)
    finish(checkpoints)
    if restored is None:
        raise UserError("run folder", str(folder), "a run that has saved a checkpoint", "Let it train on first.")
    return LoadedRun(config, lm, *restored, load_tokenizer(folder))


def evaluate_run(folder: Path) -> dict[str, float]:
    """Held-out values of a run's newest parameters on all of its held-out text, and bits per byte of baselines."""
    loaded = load_run(folder)
    pieces = build_pieces(loaded.config, Share(0, 1))
    key = key_for(jax.random.key(loaded.config.train.seed), "held-out")
    values = make_held_out(pieces.objective, pieces.data.heldout, key)(loaded.params)
    scores = compare(pieces, lambda: values, folder)
    return values | {f"bits_per_byte/{name}": value for name, value in scores.items() if name != "model"}
