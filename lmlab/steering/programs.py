"""Which program the words of the command line name."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from lmlab.core.errors import UserError, check
from lmlab.data.tokenizers import TextTokenizer
from lmlab.inference.programs import Particle, Program
from lmlab.recipe import load_file

Build = Callable[[TextTokenizer], Program]
"""`build(tokenizer)`: a program for the tokens of a model."""


@dataclass(frozen=True)
class Ready:
    """A program that has a name."""

    argument: str
    """What stands after the colon; empty: nothing."""
    build: Callable[[str, int], Build]
    """`build(argument, prompts)` checks the argument before any model is read."""


def find_program(words: str, prompts: int, temperature: float) -> Build:
    """The program that `NAME`, `NAME:ARGUMENT` or `FILE.py` says, at a temperature (0: its own).

    Raises `UserError` for what there is not, and what it returns raises it for a program that reads other prompts.
    """
    build = _from_file(Path(words)) if words.endswith(".py") else _ready(words, prompts)

    def made(tokenizer: TextTokenizer) -> Program:
        program = build(tokenizer)
        wanted = f"{program.contexts}, one for each context of the program"
        check(program.contexts == prompts, "--prompt", prompts, wanted)
        return replace(program, temperature=temperature) if temperature else program

    return made


def _ready(words: str, prompts: int) -> Build:
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
    return ready.build(argument, prompts)


def _from_file(path: Path) -> Build:
    make = getattr(load_file("program", path), "program", None)
    if not callable(make):
        raise UserError("program", str(path), "a file with a function program(tokenizer) that returns a Program")

    def build(tokenizer: TextTokenizer) -> Program:
        made = make(tokenizer)
        if not isinstance(made, Program):
            raise UserError("program", str(path),
                            f"program(tokenizer) to return lmlab.inference.programs.Program, not {type(made).__name__}",
                            )  # fmt: skip
        return made

    return build


def _free(argument: str, prompts: int) -> Build:
    del argument, prompts

    def build(tokenizer: TextTokenizer) -> Program:
        ends = tokenizer.end_ids

        def step(particle: Particle, state: tuple[()]) -> tuple[()]:
            token = particle.sample(particle.context.next_token())
            for end in ends:
                particle.finish(token == end)
            return state

        return Program(step)

    return build


READY = {"free": Ready("", _free)}
"""By name."""
