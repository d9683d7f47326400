"""A small model of bytes, held-out prompts, and the constraint "no word longer than 4 letters" as three programs."""

from functools import lru_cache
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from lmlab.core.types import Array, Params
from lmlab.data.config import DataConfig
from lmlab.data.open import open_data
from lmlab.inference.programs import Particle, Program
from lmlab.models.config import AttentionConfig, TransformerConfig
from lmlab.models.lm import LM
from lmlab.optim.config import OptimConfig, ScheduleConfig
from lmlab.pretrain import pretrain
from lmlab.recipe import EvalConfig, Pretrain
from lmlab.runs import load_run
from lmlab.train.config import TrainConfig

LONGEST = 4
"""Letters of a word."""
END = 256
"""The token that ends a document, and a text."""
PROMPT = 48
"""Bytes of a prompt."""
DATA = DataConfig(length=256, batch_size=16)


def byte_model(folder: Path, steps: int) -> tuple[LM, Params]:
    """A transformer of 2 layers of width 64 on the sources and help texts of Python; trained where it is not yet."""
    recipe = Pretrain(
        model=TransformerConfig(layers=2, width=64, max_length=256, attention=AttentionConfig(heads=4)),
        data=DATA,
        optim=OptimConfig(rule="muon", schedule=ScheduleConfig(peak=4e-3, decay="wsd", end=0.0)),
        train=TrainConfig(steps, eval_every=steps, sample_every=0, checkpoint_every=steps, keep_best=0),
        eval=EvalConfig(batches=4, baselines=False),
    )
    pretrain(recipe, folder)
    run = load_run(folder)
    return run.lm.for_decoding(run.params)


def held_out_prompts(count: int) -> list[bytes]:
    """Beginnings that end with a space, from held-out documents far from each other."""
    texts = [text.encode() for text in open_data(DATA).texts("heldout")]
    long = [text for text in texts if len(text) > 2000]
    chosen = [long[i * len(long) // count] for i in range(count)]
    ends = [text.index(b" ", 600) + 1 for text in chosen]
    return [text[end - PROMPT : end] for text, end in zip(chosen, ends, strict=True)]


def letters_after() -> Array:
    """int8 [LONGEST + 1, 257]: letters of the word that is being written, after each token; -1 of a word too long."""
    letter_V = np.asarray([chr(token).isalpha() and token < 128 for token in range(END + 1)])
    count_L1 = np.arange(LONGEST + 1)[:, None]
    after_LV = np.where(letter_V, np.where(count_L1 < LONGEST, count_L1 + 1, -1), 0)
    return jnp.asarray(after_LV, jnp.int8)


State = dict[str, Array]
"""Letters of the word that is being written, log-probability of all tokens so far under the model, and whether every
word was short."""


def free(p: Particle, state: State) -> State:
    """A token of the model, of which it is only noted whether it does: what rejection sampling looks at."""
    return _drawn(p, state, p.context.logprobs_V)


def plain(p: Particle, state: State) -> State:
    """A token of the model, which must do."""
    state = free(p, state)
    p.condition(state["fits"])
    return state


def optimal(p: Particle, state: State) -> State:
    """A token that does, weighed by the mass of those that do: the locally optimal proposal."""
    model_V = p.context.logprobs_V
    p.observe(p.context.mask(p.tables[state["letters"]] >= 0), True)
    return _drawn(p, state, model_V)


def _drawn(p: Particle, state: State, model_V: Array) -> State:
    token = p.sample(p.context.next_token())
    p.finish(token == END)
    letters = p.tables[state["letters"], token].astype(jnp.int32)
    return {"letters": jnp.maximum(letters, 0), "log_prob": state["log_prob"] + model_V[token],
            "fits": state["fits"] & (letters >= 0)}  # fmt: skip


PROPOSALS = {"free": free, "plain": plain, "optimal": optimal}


@lru_cache
def short_words(proposal: str) -> Program:
    """No word longer than 4 letters, after a prompt that ends with a space."""
    start = {"letters": jnp.int32(0), "log_prob": jnp.zeros(()), "fits": jnp.asarray(True)}
    return Program(PROPOSALS[proposal], start, letters_after())
