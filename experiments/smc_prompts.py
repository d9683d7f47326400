"""A trained model under constraints on its next sentence: masked decoding, the best of several, and SMC."""

import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.results import say
from lmlab.core.errors import check
from lmlab.core.types import Array, Key
from lmlab.inference.automata import constrained
from lmlab.inference.constraints import regex
from lmlab.inference.programs import Particle, Program
from lmlab.inference.smc import Driver, only, standard, steering
from lmlab.inference.text import continuation, encode_prompts
from lmlab.inference.texts import infer
from lmlab.interop.pretrained import Pretrained
from lmlab.loading import load_model

PROMPTS = (
    "The Fed announced on Wednesday that", "My favorite writer is probably", "The best way to learn a language is",
    "When the rain stopped, the children", "Scientists have found that",
)  # fmt: skip
WORD = "[A-Za-z']"
MONTH = "(January|February|March|April|May|June|July|August|September|October|November|December)"
CONSTRAINTS = {
    "words of at most 5 letters": rf"( {WORD}{{1,5}},?){{4,}}\.",
    "no letter e": r"( [A-DF-Za-df-z0-9',;:-]+){4,}\.",
    "eight words": rf"( {WORD}+,?){{7}} {WORD}+\.",
    "ends with a date": rf"( {WORD}+,?)+ (on|in) {MONTH} [1-3]?[0-9], (19|20)[0-9]{{2}}\.",
}
"""Regular expressions of what follows up to the end of the sentence, of four words at least; there the text ends."""
DRIVERS = {"importance": standard(threshold=0), "standard": standard(), "steering": steering(3)}
"""Of texts that masks keep to a constraint; the first is always there, since masked decoding is read off it."""
State = dict[str, Array]
"""State of the automaton, -1 of a sentence that it does not allow; and log-probability of all tokens so far."""


@dataclass(frozen=True)
class Sizes:
    """How much is drawn."""

    seeds: int
    particles: int
    tokens: int
    prompts: int = len(PROMPTS)
    constraints: tuple[str, ...] = tuple(CONSTRAINTS)
    drivers: tuple[str, ...] = tuple(DRIVERS)


@dataclass(frozen=True)
class Drawn:
    """The particles of a run, on the host, and what the run has taken."""

    texts: list[str]
    """What each has added to the prompt."""
    length_P: np.ndarray
    log_prob_P: np.ndarray
    """Of each text under the model."""
    probability_P: np.ndarray
    """By weight, of those whose sentence is finished as it should be; zeros where there is none."""
    log_weight_P: np.ndarray
    rounds: int
    seconds: float


@dataclass(frozen=True)
class Answer:
    """What an arm gives after one prompt, from one seed."""

    text: str
    """Empty: nothing that does."""
    log_prob: float
    """Of it under the model, in nats."""
    tokens: int
    log_evidence: float | None
    """log Z-hat. None: minus infinity, or an arm that has no estimate."""
    rows: int
    """That the model has read."""
    seconds: float


def programs(model: Pretrained, pattern: str, tokens: int) -> tuple[Program, Program]:
    """Sentences of a pattern that end within so many tokens, by masks; and the model's own, looked at as they come."""
    # What stands behind the full stop in its token, such as a line break, is nobody's concern.
    automaton = regex(rf"{pattern}(.|\n)*")
    spellings_V = _padded(model)
    masks = constrained(automaton, spellings_V, tokens=tokens)
    accepts_Q = jnp.asarray(automaton.accepts_Q)

    def masked(p: Particle, state: State) -> State:
        model_V = p.context.logprobs_V
        at = masks.step(p, state["at"])
        p.finish(p.tables["accepts_Q"][at])
        return {"at": at, "log_prob": state["log_prob"] + model_V[p.context.token]}

    def free(p: Particle, state: State) -> State:
        token = p.sample(p.context.next_token())
        at = p.tables["next_QV"][state["at"], token].astype(jnp.int32)
        p.finish((at < 0) | p.tables["accepts_Q"][at])
        return {"at": at, "log_prob": state["log_prob"] + p.context.logprobs_V[token]}

    start, tables = {"at": masks.start, "log_prob": jnp.zeros(())}, {**masks.tables, "accepts_Q": accepts_Q}
    return Program(masked, start, tables), Program(free, start, tables)


def _padded(model: Pretrained) -> tuple[bytes, ...]:
    assert model.text is not None
    spellings_V = model.text.tokenizer.spellings_V
    return (*spellings_V, *(b"",) * (model.lm.vocab_size - len(spellings_V)))


def draw(
    model: Pretrained, program: Program, driver: Driver, prompt: np.ndarray, key: Key, particles: int, tokens: int
) -> Drawn:  # fmt: skip
    """One run. A particle that has not finished its sentence, or not as it should be, counts as dead."""
    start = time.perf_counter()
    *_, end = infer(model.lm, model.params, program, [prompt], key, driver, particles=particles, tokens=tokens)
    at_P = end.state.program_P["at"]
    end = only(end, end.state.finished_P & (at_P >= 0) & program.tables["accepts_Q"][at_P])
    tokens_PS, length_P, *rest = jax.device_get(
        (end.state.tokens_PS, end.state.length_P, end.state.program_P["log_prob"], end.probabilities, end.log_weight_P)
    )
    seconds = time.perf_counter() - start
    assert model.text is not None
    texts = [
        continuation(model.text.tokenizer, prompt, tokens_S[:length])
        for tokens_S, length in zip(tokens_PS, length_P, strict=True)
    ]
    return Drawn(texts, length_P, *rest, int(end.rounds), seconds)


def answers(drawn: dict[str, Drawn], rng: np.random.Generator) -> dict[str, Answer]:
    """What each arm makes of the runs: the best is the most probable text, SMC's is drawn by weight."""
    best = lambda one: int(np.argmax(np.where(one.probability_P > 0, one.log_prob_P, -np.inf)))
    by_weight = lambda one: int(rng.choice(len(one.probability_P), p=_normalised(one.probability_P)))
    free, masked = drawn["unconstrained"], drawn["importance"]
    # A single draw has the weight that a population of one would have.
    alone = replace(answer(masked, 0), rows=int(masked.length_P[0]), log_evidence=_finite(masked.log_weight_P[0]))
    return {
        "unconstrained, best": answer(free, best(free)),
        "masked, one": alone,
        "masked, best": replace(answer(masked, best(masked)), log_evidence=None),
        **{name: answer(one, by_weight(one)) for name, one in drawn.items() if name != "unconstrained"},
    }


def answer(drawn: Drawn, particle: int) -> Answer:
    """The text of a particle; nothing where it does not do."""
    rows = len(drawn.length_P) * drawn.rounds
    evidence = _finite(np.logaddexp.reduce(drawn.log_weight_P.astype(np.float64)) - math.log(len(drawn.length_P)))
    if drawn.probability_P[particle] == 0:
        return Answer("", 0.0, 0, evidence, rows, drawn.seconds)
    length = int(drawn.length_P[particle])
    return Answer(drawn.texts[particle], float(drawn.log_prob_P[particle]), length, evidence, rows, drawn.seconds)


def _finite(value: float) -> float | None:
    """JSON has no infinity."""
    return float(value) if value > -math.inf else None


def _normalised(probability_P: np.ndarray) -> np.ndarray:
    """In float64, in which they have to sum to 1; equal where all are dead."""
    total = probability_P.sum(dtype=np.float64)
    return probability_P / total if total > 0 else np.full(len(probability_P), 1 / len(probability_P))


def run_prompts(path: Path, sizes: Sizes) -> dict[str, Any]:
    """Answers of each arm, [prompt][seed], by constraint."""
    say(f"reading {path}")
    model = load_model(path)
    check(model.text is not None, "--model", str(path), "a model with its tokenizer")
    assert model.text is not None
    prompts = encode_prompts(model.text.tokenizer, PROMPTS[: sizes.prompts])
    found: dict[str, Any] = {}
    for name in sizes.constraints:
        masked, free = programs(model, CONSTRAINTS[name], sizes.tokens)
        runs = {
            "unconstrained": (free, standard(threshold=0)),
            **{arm: (masked, DRIVERS[arm]) for arm in sizes.drivers},
        }
        for number, prompt in enumerate(prompts):
            say(f"{name}: {PROMPTS[number]}")
            for seed in range(sizes.seeds):
                key = jax.random.fold_in(jax.random.key(seed), number)
                drawn = {arm: draw(model, program, driver, prompt, key, sizes.particles, sizes.tokens)
                         for arm, (program, driver) in runs.items()}  # fmt: skip
                for arm, one in answers(drawn, np.random.default_rng((number, seed))).items():
                    rows = found.setdefault(name, {}).setdefault(arm, [[] for _ in prompts])
                    rows[number].append(asdict(one))
    return found
