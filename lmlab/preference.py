"""Learning from pairs of answers: a model that is there moves towards what was preferred, tied to what it was."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax

from lmlab.adapters import adapted, moving_axes, still_parts
from lmlab.core.errors import check
from lmlab.core.types import Objective, Params
from lmlab.data.open_pairs import PairData, open_pairs, read_pairs
from lmlab.finetune import draw_answers, sft_pieces, with_template
from lmlab.interop.tokenizer_files import TokenizerFiles, read_tokenizer_files, write_tokenizer_files
from lmlab.loading import Opened, open_model
from lmlab.models.flops import training_flops_per_token
from lmlab.models.lm import LM
from lmlab.objectives import pair_losses
from lmlab.objectives.config import PairLossConfig
from lmlab.objectives.dpo import REFERENCE, beside, dpo, no_reference, under_adapters
from lmlab.objectives.pair_losses import PairLoss, after
from lmlab.optim.chain import build_optimizer
from lmlab.policy import complete, has_copy, policy
from lmlab.pretrain import draw_continuations
from lmlab.recipe import Preference, ResolvedPreference, ResolvedSFT
from lmlab.reference import read_stored, store, with_reference
from lmlab.runs import begun
from lmlab.train.folder import is_run, settle_config
from lmlab.train.hosts import all_do
from lmlab.train.parallel import Share, param_shardings
from lmlab.train.state import State, loaded_state
from lmlab.training import Outcome, Pieces, build_lm, train_run


def prefer(config: Preference, folder: Path, profile: tuple[int, int] | None = None) -> Outcome:
    """Train the source on pairs into a run folder, or go on with the run that is there. See `train_run`."""
    return train_run(config, folder, partial(_begin, config, folder), profile)


def _begin(config: Preference, folder: Path, share: Share) -> Pieces:
    """The pieces, with the parameters of the source, which is not read where the run goes on."""
    if was := begun(folder, ResolvedPreference):
        same = ResolvedPreference(**vars(config), model=replace(was.model, execution=config.execution))
        return tuning_pieces(folder, same, read_tokenizer_files(folder), share)
    source = open_model(Path(config.source), config.execution, config.optim.parameters)
    text = _text(source.text, config)
    resolved = ResolvedPreference(**vars(config), model=source.config)
    if is_run(folder):
        # Before anything is computed, or written where another run lies.
        settle_config(folder, resolved, free=("parallel",))
    data = _read(resolved, text)
    base = build_lm(resolved)
    held: list[Params] = []
    if config.loss.reference == "stored":
        check(jax.process_count() == 1, "loss.reference", "stored", "beside, in a job of several processes")
        held.append(_load(source, base))
        score = partial(with_reference, lm=base, params=held[0], batch_size=config.data.batch_size,
                        tail=config.loss.tail, chunk=config.loss.chunk)  # fmt: skip
        data = store(folder, replace(data, train=score(data.train), heldout=score(data.heldout)))
    pieces = preference_pieces(resolved, text, data, share)

    def load(shardings: State) -> State:
        params = held.pop() if held else _load(source, base)
        return loaded_state(
            params, pieces.tx, config.train.seed, shardings, pieces.still, partial(complete, resolved, base)
        )

    return replace(pieces, load=load, origin=f"from {config.source}")


def tuning_pieces(
    folder: Path, config: ResolvedPreference | ResolvedSFT, text: TokenizerFiles, share: Share
) -> Pieces:  # fmt: skip
    """The pieces of a run of fine-tuning that is there. Raises `UserError` for data that are not those it had."""
    if isinstance(config, ResolvedSFT):
        return sft_pieces(config, text, share)
    data = _read(config, text)
    if config.loss.reference == "stored":
        data = read_stored(folder, data)
    return preference_pieces(config, text, data, share)


def _load(source: Opened, base: LM) -> Params:
    """The parameters of the source, laid out as those of a run."""
    mesh = jax.sharding.get_mesh()
    shapes = jax.eval_shape(base.init, jax.random.key(0))
    return all_do(lambda: source.load(param_shardings(base.axes, shapes, mesh)))


def _text(text: TokenizerFiles | None, config: Preference) -> TokenizerFiles:
    """The text side of the source; without a template where it has none and none is given."""
    if config.template or text is None:
        return with_template(text, config)
    return text


def _read(config: ResolvedPreference, text: TokenizerFiles) -> PairData:
    return read_pairs(config.data, text.tokenizer, text.chat)


def preference_pieces(config: ResolvedPreference, text: TokenizerFiles, data: PairData, share: Share) -> Pieces:
    """The pieces of learning from pairs; parameters are made anew."""
    base = build_lm(config)
    lm = policy(config, base)
    moving = moving_axes(base, adapted(base, config.lora), config.lora)
    talk = partial(draw_answers, lm, text, config), partial(draw_continuations, lm, text.tokenizer, config.eval)
    return Pieces(
        config=config,
        lm=lm,
        objective=preference_objective(config, base, lm),
        tx=build_optimizer(config.optim, moving, config.train.steps, config.train.seed),
        data=open_pairs(data, config.data, text.tokenizer, **share._asdict()),
        sample=talk[0] if text.chat else talk[1],
        write=partial(write_tokenizer_files, files=text),
        further_flops=reference_flops(config),
        still=(*still_parts(base, config.lora), *((REFERENCE,) if has_copy(config) else ())),
    )


def reference_flops(config: ResolvedPreference) -> float:
    """Operations of a token in the forward pass of a reference that is computed in every step."""
    beside = config.loss.reference == "beside"
    return training_flops_per_token(config.model, config.data.length) / 3 if beside else 0.0


def preference_objective(config: Preference, base: LM, lm: LM) -> Objective:
    """The objective that the recipe asks for."""
    loss = config.loss
    near = under_adapters if config.lora.rank else beside
    references = {"stored": None, "uniform": no_reference, "beside": near(base, loss.chunk)}
    return dpo(
        lm, build_pair_loss(loss), loss.beta, reference=references[loss.reference], sft=loss.sft, tail=loss.tail,
        chunk=loss.chunk,
    )  # fmt: skip


def build_pair_loss(config: PairLossConfig) -> PairLoss:
    """The loss that a config describes."""
    options: dict[str, Callable[[], PairLoss]] = {
        "sigmoid": lambda: partial(pair_losses.sigmoid, smoothing=config.smoothing),
        "robust": lambda: partial(pair_losses.robust, flips=config.smoothing),
        "exo_pair": lambda: partial(pair_losses.exo_pair, smoothing=config.smoothing),
        "simpo": lambda: partial(pair_losses.simpo, gamma=config.gamma),
    }
    loss: PairLoss = options[config.loss]() if config.loss in options else getattr(pair_losses, config.loss)
    if config.per_token:
        loss = after(pair_losses.per_token, loss)
    slopes = {"forward_kl": pair_losses.forward_kl, "jensen_shannon": pair_losses.jensen_shannon}
    if config.divergence in slopes:
        # The divergence is of whole answers: it comes before means over tokens are taken.
        loss = after(partial(pair_losses.diverging, slopes[config.divergence]), loss)
    return loss
