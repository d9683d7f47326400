"""Which program the words of the command line name."""

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from lmlab.core.errors import UserError, check
from lmlab.data.tokenizers import TextTokenizer
from lmlab.inference.automata import Automaton, constrained
from lmlab.inference.composition import classified, infilling, intersection, token_scores
from lmlab.inference.constraints import only_words, regex, without, word_length
from lmlab.inference.grammar import grammar, json_schema
from lmlab.inference.programs import Particle, Program
from lmlab.recipe import load_file

GAP = "___"
"""Where a text to be filled has a gap; longer ones are one, too."""


@dataclass(frozen=True)
class Setting:
    """What a program is made for."""

    tokenizer: TextTokenizer
    prompts: tuple[str, ...]
    tokens: int
    """That a text may have."""
    vocab_size: int
    """Of the model, which may have numbers that no token of the tokenizer has."""

    @property
    def spellings(self) -> tuple[bytes, ...]:
        """Bytes of each token of the model."""
        known = self.tokenizer.spellings_V
        return known + (b"",) * (self.vocab_size - len(known))


Build = Callable[[Setting], Program]
"""`build(setting)`: the program for the tokens of a model."""


@dataclass(frozen=True)
class Ready:
    """A program that has a name."""

    argument: str
    """What stands after the colon; empty: nothing."""
    build: Callable[[str], Build]
    """`build(argument)` checks the argument before any model is read."""


def find_program(words: str, temperature: float) -> Build:
    """The program that `NAME`, `NAME:ARGUMENT` or `FILE.py` says, at a temperature (0: its own).

    Raises `UserError` for what there is not, and what it returns raises it for a program that reads other prompts.
    """
    build = _from_file(Path(words)) if words.endswith(".py") else _ready(words)

    def made(setting: Setting) -> Program:
        program, prompts = build(setting), len(setting.prompts)
        wanted = f"{program.contexts}, one for each context of the program"
        check(program.contexts == prompts, "--prompt", prompts, wanted)
        return replace(program, temperature=temperature) if temperature else program

    return made


def _ready(words: str) -> Build:
    name, colon, argument = words.partition(":")
    usage = [f"{known}:{ready.argument}" if ready.argument else known for known, ready in READY.items()]
    if name not in READY:
        near = difflib.get_close_matches(name, READY, n=1)
        hint = f"Did you mean {near[0]}? " if near else ""
        raise UserError("--program", words, "a ready program, or a Python file FILE.py",
                        f"{hint}Ready: {', '.join(usage)}.")  # fmt: skip
    ready = READY[name]
    check(bool(ready.argument) or not colon, "--program", words, f"{name} alone: it takes no argument")
    check(bool(argument) or not ready.argument, "--program", words, f"{name}:{ready.argument}")
    return ready.build(argument)


def _from_file(path: Path) -> Build:
    make = getattr(load_file("program", path), "program", None)
    if not callable(make):
        raise UserError("program", str(path), "a file with a function program(tokenizer) that returns a Program")

    def build(setting: Setting) -> Program:
        made = make(setting.tokenizer)
        if not isinstance(made, Program):
            raise UserError("program", str(path),
                            f"program(tokenizer) to return lmlab.inference.programs.Program, not {type(made).__name__}",
                            )  # fmt: skip
        return made

    return build


def _free(argument: str) -> Build:
    del argument

    def build(setting: Setting) -> Program:
        def step(particle: Particle, state: tuple[()]) -> tuple[()]:
            token = particle.sample(particle.context.next_token())
            for end in setting.tokenizer.end_ids:
                particle.finish(token == end)
            return state

        return Program(step)

    return build


def _words(argument: str) -> Build:
    check(argument.isdecimal() and int(argument) >= 1, "--program", f"words:{argument}", "words:LETTERS, at least 1")
    return _kept(word_length(int(argument)))


def _forbid(argument: str) -> Build:
    return _kept(without(argument.split(",")))


def _vocabulary(argument: str) -> Build:
    return _kept(only_words(_read(argument).split()))


def _regex(argument: str) -> Build:
    automaton = regex(argument)

    def build(setting: Setting) -> Program:
        return constrained(automaton, setting.spellings, setting.tokenizer.end_ids, setting.tokens)

    return build


def _parsed(make: Callable[[str, Sequence[bytes], Sequence[int], int], Program], argument: str) -> Build:
    """Texts of what a file says."""
    text = _read(argument)
    return lambda setting: make(text, setting.spellings, setting.tokenizer.end_ids, setting.tokens)


def _infill(argument: str) -> Build:
    pieces = [piece.rstrip() for piece in re.split(f"{GAP}_*", argument)]
    check(len(pieces) >= 2, "--program", f"infill:{argument}", f"texts with {GAP} where the model is to write")
    check(all(pieces[1:-1]), "--program", f"infill:{argument}", "text between two gaps")

    def build(setting: Setting) -> Program:
        tokenizer = setting.tokenizer
        befores = [setting.prompts[0], *["."] * (len(pieces) - 1)]
        parts = [_tokens_after(tokenizer, *pair) for pair in zip(befores, pieces, strict=True)]
        return infilling(parts, setting.vocab_size, setting.tokens, tokenizer.end_ids)

    return build


def _tokens_after(tokenizer: TextTokenizer, before: str, text: str) -> list[int]:
    """Tokens of a text as it is cut in the middle of another, or by itself where the two are cut together."""
    start, whole, alone = (tokens.tolist() for tokens in tokenizer.encode_batch([before, before + text, text]))
    return whole[len(start) :] if whole[: len(start)] == start else alone


def _intersect(argument: str) -> Build:
    del argument
    return lambda setting: intersection(len(setting.prompts), setting.tokenizer.end_ids)


def _class(argument: str) -> Build:
    names = argument.split(",")
    check(len(names) == 2, "--program", f"class:{argument}", "class:LIKE.txt,UNLIKE.txt")
    like, unlike = ([line for line in _read(name).splitlines() if line.strip()] for name in names)

    def build(setting: Setting) -> Program:
        encode = setting.tokenizer.encode_batch
        scores_V = token_scores(encode(like), encode(unlike), setting.vocab_size)
        return classified(scores_V, end_ids=setting.tokenizer.end_ids)

    return build


def _kept(automaton: Automaton) -> Build:
    """Text that obeys from its first token, with what the prompt has begun, to wherever it ends."""

    def build(setting: Setting) -> Program:
        begun = automaton.after(setting.prompts[0].encode())
        return constrained(begun, setting.spellings, setting.tokenizer.end_ids)

    return build


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("--program", path, f"a file of UTF-8 text ({error})") from error


READY = {
    "free": Ready("", _free),
    "words": Ready("LETTERS", _words),
    "forbid": Ready("TEXT,TEXT", _forbid),
    "vocabulary": Ready("FILE", _vocabulary),
    "regex": Ready("PATTERN", _regex),
    "json": Ready("SCHEMA.json", partial(_parsed, json_schema)),
    "lark": Ready("GRAMMAR.lark", partial(_parsed, grammar)),
    "infill": Ready(f"TEXT{GAP}TEXT", _infill),
    "intersect": Ready("", _intersect),
    "class": Ready("LIKE.txt,UNLIKE.txt", _class),
}
"""By name."""
