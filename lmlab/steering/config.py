"""The options of `lmlab steer`. Imports no JAX."""

import math
from dataclasses import dataclass
from typing import Literal

import tyro

from lmlab.core.errors import check, check_text


@dataclass(frozen=True)
class Steer:
    """Write texts under a constraint by SMC steering: the model's own texts, given that they meet it.

    Exit code 1: no text is left, because all particles died or none came to its end; the folder tells where.
    """

    model: tyro.conf.Positional[str]
    """Run folder, folder of transformers (config.json, safetensors), .gguf file, or .bin of llama2.c."""
    program: str = "free"
    """NAME or NAME:ARGUMENT of a ready program, or a Python file with a function program(tokenizer) that returns a
    lmlab.inference.programs.Program. free: no constraint; words:LETTERS: no longer words; forbid:TEXT,TEXT: none of
    these anywhere; vocabulary:FILE: only words of that file; regex:PATTERN: texts that match it as a whole;
    json:SCHEMA.json and lark:GRAMMAR.lark: texts that a JSON schema or a grammar describes;
    infill:"TEXT ___ TEXT": the gaps are filled; intersect: what fits all of the prompts; class:LIKE.txt,UNLIKE.txt:
    texts weighed by the probability of being like the lines of the first file."""
    prompt: tuple[str, ...] = ("",)
    """What the texts continue; programs over several contexts read one for each."""
    particles: int = 16
    """Partial texts side by side. More of them: closer to the model's own texts, and slower."""
    method: Literal["smc", "steer"] = "smc"
    """smc: particles are drawn anew by their weights when these differ too much; steer: each has several children, and
    as many as there are particles are kept, none twice."""
    children: int = 3
    """steer: children of a particle."""
    threshold: float = 0.5
    """smc: draw anew when the effective number of particles is below this share of their number; 0: never, 1: whenever
    weights differ."""
    scheme: Literal["stratified", "systematic", "multinomial", "residual"] = "stratified"
    """smc: how they are drawn."""
    tokens: int = 64
    """Tokens of a text at most."""
    unfinished: Literal["keep", "drop"] = "keep"
    """What to do with texts that the program has not ended within --tokens: they count as they are, or not at all."""
    temperature: float = 0.0
    """Divides the model's logits: it is the model at this temperature that is steered; 0: as the program says, which is
    1 unless it says more."""
    seed: int = 0
    """Of all draws."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the parameters, except those of a run, which keep theirs."""
    out: str = ""
    """Folder for report.html and trace.json; empty: runs/NAME-steer."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        check(bool(self.program), "--program", self.program, "a program")
        check(bool(self.prompt), "--prompt", self.prompt, "at least one; it may be empty")
        check_text("--program", self.program)
        check(self.particles >= 1, "--particles", self.particles, "at least 1")
        check(self.children >= 1, "--children", self.children, "at least 1")
        check(0 <= self.threshold <= 1, "--threshold", self.threshold, "a share in [0, 1]")
        check(self.tokens >= 1, "--tokens", self.tokens, "at least 1")
        check(0 <= self.temperature < math.inf, "--temperature", self.temperature, "0 or a positive number")
        check(0 <= self.seed < 2**32, "--seed", self.seed, "from 0 to 2^32 - 1")
