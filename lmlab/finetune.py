"""Supervised fine-tuning: the objective of pre-training, on what the assistant says in conversations."""

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path

from lmlab.adapters import adapted, add_adapters, moving_axes, still_parts
from lmlab.core.errors import UserError
from lmlab.core.types import Key, Params
from lmlab.data.chat import ChatTemplate, render
from lmlab.data.conversations import open_conversations
from lmlab.inference.text import sample_texts
from lmlab.interop.tokenizer_files import TokenizerFiles, read_tokenizer_files, write_tokenizer_files
from lmlab.loading import open_model
from lmlab.models.lm import LM
from lmlab.optim.chain import build_optimizer
from lmlab.pretrain import build_objective
from lmlab.recipe import SFT, Preference, ResolvedPreference, ResolvedSFT
from lmlab.runs import begun
from lmlab.train.hosts import all_do
from lmlab.train.parallel import Share
from lmlab.train.state import State, loaded_state
from lmlab.training import Outcome, Pieces, build_lm, train_run


def sft(config: SFT, folder: Path, profile: tuple[int, int] | None = None) -> Outcome:
    """Fine-tune the source into a run folder, or go on with the run that is there. See `train_run`."""
    return train_run(config, folder, partial(_begin, config, folder), profile)


def _begin(config: SFT, folder: Path, share: Share) -> Pieces:
    """The pieces, with the parameters of the source, which is not read where the run goes on."""
    if was := begun(folder, ResolvedSFT):
        same = ResolvedSFT(**vars(config), model=replace(was.model, execution=config.execution))
        return sft_pieces(same, read_tokenizer_files(folder), share)
    model = open_model(Path(config.source), config.execution, config.optim.parameters)
    text = with_template(model.text, config)
    resolved = ResolvedSFT(**vars(config), model=model.config)
    pieces = sft_pieces(resolved, text, share)

    base = build_lm(resolved)

    def load(shardings: State) -> State:
        params = all_do(lambda: model.load({name: shardings.params[name] for name in base.axes}))
        complete = partial(add_adapters, base, config.lora)
        return loaded_state(params, pieces.tx, config.train.seed, shardings, pieces.still, complete)

    return replace(pieces, load=load, origin=f"from {config.source}")


def with_template(text: TokenizerFiles | None, config: SFT | Preference) -> TokenizerFiles:
    """The text side of a source with the chat template that the recipe asks for. Raises `UserError`: there is none.

    None is made up: what marks a turn has to be in the vocabulary, or a model learns to spell it out of letters.
    """
    if text is None:
        raise UserError("source", config.source, "a model with a tokenizer beside it",
                        "Put its tokenizer.json and tokenizer_config.json into the folder.")  # fmt: skip
    if config.template:
        return _written_with(text, Path(config.template).expanduser())
    if text.chat is None:
        raise UserError("source", config.source, "a model with a chat template",
                        "Give one: --template FILE, such as the chat_template.jinja of its makers' chat model.",
                        )  # fmt: skip
    return text


def _written_with(text: TokenizerFiles, path: Path) -> TokenizerFiles:
    try:
        template = ChatTemplate(path.read_text(encoding="utf-8"), {})
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("template", str(path), f"a file of Jinja ({error})") from error
    # Writing names the tokens that a template may ask for (eos_token), and gives those of bytes a name at all.
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer_files(Path(folder), replace(text, chat=template))
        return read_tokenizer_files(Path(folder))


def sft_pieces(config: ResolvedSFT, text: TokenizerFiles, share: Share) -> Pieces:
    """The pieces of fine-tuning; parameters are made anew. text: with a template. Raises `UserError` for its data."""
    assert text.chat is not None
    base = build_lm(config)
    lm = adapted(base, config.lora)
    return Pieces(
        config=config,
        lm=lm,
        objective=build_objective(config.objective, lm, text.tokenizer),
        tx=build_optimizer(config.optim, moving_axes(base, lm, config.lora), config.train.steps, config.train.seed),
        still=still_parts(base, config.lora),
        data=open_conversations(config.data, text.tokenizer, text.chat, **share._asdict()),
        sample=partial(draw_answers, lm, text, config),
        write=partial(write_tokenizer_files, files=text),
        compare=bits_per_byte,
    )


def draw_answers(
    lm: LM, text: TokenizerFiles, config: ResolvedSFT | ResolvedPreference, params: Params, key: Key
) -> list[tuple[str, str]]:  # fmt: skip
    """The prompts as chats, written out, each with an answer."""
    assert text.chat is not None
    # Templates may tell the date: that of the data, so that runs compare.
    write = partial(render, text.chat, add_generation_prompt=True, now=datetime.fromisoformat(config.data.date))
    chats = [write([{"role": "user", "content": prompt}]) for prompt in config.eval.prompts]
    tokens = [text.tokenizer.encode_marked(chat)[0] for chat in chats]
    drawn = sample_texts(lm, params, text.tokenizer, tokens, key, config.eval.sampling)
    return [(chat, answer) for chat, (answer, _) in zip(chats, drawn, strict=True)]


def bits_per_byte(held_out: Mapping[str, float]) -> dict[str, float]:
    """Of what the assistant says; nothing stands beside it but the row of step 0, which is the source."""
    return {"model": held_out["bits_per_byte"]}
