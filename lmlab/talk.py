"""Talking with a model in the terminal."""

import sys
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from lmlab.core.errors import UserError, check
from lmlab.core.types import Key
from lmlab.data.chat import encode_chat_prompt
from lmlab.inference.config import SamplingConfig, Verify
from lmlab.inference.sample import Sample
from lmlab.inference.self_speculative import self_speculate
from lmlab.inference.speculative import Model, speculate
from lmlab.inference.text import TextCodec, before_stop, continuation, encode_prompts, stream_text
from lmlab.interop.pretrained import Pretrained, chat_of, tokenizer_of
from lmlab.runs import LoadedHeads

HELP = "An empty line, /quit or Ctrl-D ends; /new forgets what was said; Ctrl-C cuts an answer short."


def say(text: str) -> None:
    """Show a piece of text."""
    print(text, end="", flush=True)


def ask() -> str | None:
    """The next line of the user; None at the end of the input."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None


def talk(
    model: Pretrained, lines: Sequence[str], system: str, key: Key, config: SamplingConfig,
    ask: Callable[[], str | None] = ask, say: Callable[[str], None] = say,
) -> None:  # fmt: skip
    """A conversation: each line is answered in the light of all before. lines: said first; where there are any, the
    conversation ends with them, otherwise `ask` gives the lines. Raises `UserError` if the model has no chat template.
    """
    template, codec = chat_of(model), tokenizer_of(model)
    if not lines:
        say(f"{HELP}\n")
    start = [{"role": "system", "content": system}] if system else []
    lm, params = model.lm.for_decoding(model.params)
    messages = list(start)
    for number, line in enumerate(_lines(lines, ask)):
        if line == "/new":
            messages = list(start)
            continue
        messages.append({"role": "user", "content": line})
        try:
            answer = ""
            prompt = encode_chat_prompt(template, codec, messages)
            for piece in stream_text(lm, params, codec, prompt, jax.random.fold_in(key, number), config):
                answer += piece
                say(piece)
        except KeyboardInterrupt:
            say(" ...")
        except UserError as error:
            if lines or error.field != "prompt":
                raise
            # The terminal stays; what was said last is taken back.
            say(f"{error} Or start anew with /new.")
            messages.pop()
            continue
        finally:
            say("\n")
        messages.append({"role": "assistant", "content": answer})


def _lines(lines: Sequence[str], ask: Callable[[], str | None]) -> Iterator[str]:
    if lines:
        yield from lines
        return
    while (line := ask()) and line.strip() and line.strip() != "/quit":
        yield line.strip()


def draft_text(
    target: Pretrained, draft: Pretrained, prompts: Sequence[str], key: Key, config: SamplingConfig, ahead: int,
    verify: Verify = "token",
) -> list[str]:  # fmt: skip
    """Continuations by speculative decoding. Raises `UserError` where the two cut text in different ways."""
    codec, other = tokenizer_of(target), tokenizer_of(draft)
    tokens = encode_prompts(codec, prompts)
    same = codec.spellings_V == other.spellings_V and all(map(np.array_equal, tokens, encode_prompts(other, prompts)))
    check(same, "draft", "another tokenizer", "that of the model")
    models = Model(target.lm, target.params), Model(draft.lm, draft.params)
    drawn = speculate(*models, tokens, key, config, ahead=ahead, verify=verify, end_ids=codec.end_ids).samples
    return _texts(codec, tokens, drawn, config)


def heads_text(
    run: LoadedHeads, prompts: Sequence[str], key: Key, config: SamplingConfig, heads: int, verify: Verify = "token"
) -> list[str]:  # fmt: skip
    """Continuations by head 1, drafted by heads 2 to `heads`. Raises `UserError` where the model has fewer."""
    check(1 <= heads <= run.model.heads, "--heads", heads, f"1 to {run.model.heads}, the heads of the model")
    codec = run.text.tokenizer
    tokens = encode_prompts(codec, prompts)
    drawn = self_speculate(
        run.model, run.params, tokens, key, config, ahead=heads - 1, verify=verify, end_ids=codec.end_ids
    ).samples
    return _texts(codec, tokens, drawn, config)


def _texts(
    codec: TextCodec, tokens: Sequence[np.ndarray], drawn: Sequence[Sample], config: SamplingConfig
) -> list[str]:  # fmt: skip
    texts = (continuation(codec, prompt, one.tokens) for prompt, one in zip(tokens, drawn, strict=True))
    return [before_stop(text, config.stop) for text in texts]
