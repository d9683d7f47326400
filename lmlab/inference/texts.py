"""Programs over a language model as Feynman-Kac models: particles are rows of one cache, read together.

Children are drawn and weighed from the logits of their parent, so that only those that go on are read: P rows a round,
whatever the number of children. A prompt is read once, and its cache copied to the particles.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from lmlab.core.errors import check
from lmlab.core.sharding import platform
from lmlab.core.types import Array, Key, Params
from lmlab.inference.blocks import blocks, in_blocks
from lmlab.inference.engine import read_prompts
from lmlab.inference.programs import Particle, Program
from lmlab.inference.sample import check_prompts
from lmlab.inference.smc import Arrays, Driver, FeynmanKac, Population, advance, concluded, population
from lmlab.models.lm import LM


@struct.dataclass
class Texts:
    """P particles of a program: what they have written, and the model after it."""

    cache: Any
    """Row p M + m is context m of particle p."""
    logits_PMV: Array
    program_P: Any
    tokens_PS: Array
    """Of context 0, after the prompt; an end token that a program has drawn is among them."""
    length_P: Array
    log_twist_P: Array
    finished_P: Array


@struct.dataclass
class Written:
    """What a step has made of a particle, before its tokens are read."""

    program_P: Any
    tokens_PM: Array
    read_PM: Array
    """Which contexts have a new token."""
    log_twist_P: Array
    finished_P: Array


def begin(
    lm: LM, params: Params, program: Program, prompts: Sequence[np.ndarray], particles: int, longest: int
) -> Texts:  # fmt: skip
    """Particles that have read the prompts, once for all of them, with room for `longest` tokens.

    Raises `UserError` for prompts that cannot be continued, fewer prompts than contexts, or no room.
    """
    check(particles >= 1, "particles", particles, "at least 1")
    check(longest >= 1, "tokens", longest, "at least 1")
    check(len(prompts) == program.contexts, "prompts", len(prompts), f"{program.contexts}, one for each context")
    check_prompts(lm, prompts)
    room = max(map(len, prompts)) + longest
    check(room <= lm.max_length, "prompt", f"{room - longest} tokens and {longest} to be written",
          f"at most model.max_length = {lm.max_length} together", "Shorten the prompt, or write fewer.")  # fmt: skip
    logits_UV, cache = read_prompts(lm, params, prompts, min(-(-room // 16) * 16, lm.max_length))
    return _spread(lm, particles, program.contexts, longest, logits_UV, cache, program.start)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _spread(
    lm: LM, particles: int, contexts: int, longest: int, logits_UV: Array, cache: Any, start: Any
) -> Texts:  # fmt: skip
    rows = jnp.tile(jnp.arange(contexts), particles)
    copies = lambda x: jnp.broadcast_to(jnp.asarray(x), (particles, *jnp.shape(x)))
    return Texts(
        cache=lm.take_rows(cache, rows), logits_PMV=copies(logits_UV[:contexts]),
        program_P=jax.tree.map(copies, start), tokens_PS=jnp.zeros((particles, longest), jnp.int32),
        length_P=jnp.zeros(particles, jnp.int32), log_twist_P=jnp.zeros(particles),
        finished_P=jnp.zeros(particles, bool),
    )  # fmt: skip


@lru_cache
def program_model(lm: LM, program: Program) -> FeynmanKac:
    """The Feynman-Kac model of a program. Its parameters are (those of the model, the tables of the program).

    A particle is done where it has finished, or has filled the room that `begin` has left it. Only a program with a
    boundary lets particles wait for others: what they expect next is kept for them, at a cost.
    """
    waits = program.boundary is not None

    def propose(params: Arrays, key: Key, texts: Texts, children: int) -> tuple[Written, Array]:
        logprobs_PMV = jax.nn.log_softmax(texts.logits_PMV.astype(jnp.float32) / program.temperature)
        keys_PK = jax.random.split(key, (len(texts.length_P), children))
        step = partial(_step, program, params[1])
        some = jax.vmap(step, in_axes=(0, None, None, None, None))
        written, gain_PK = jax.vmap(some)(keys_PK, logprobs_PMV, texts.program_P, texts.log_twist_P, texts.length_P)
        return written, gain_PK

    def commit(
        params: Arrays, texts: Texts, written: Written, parent_P: Array, child_P: Array, moving_P: Array
    ) -> Texts:  # fmt: skip
        old = inherit(lm, program.contexts, texts, parent_P)
        new = jax.tree.map(lambda x_PK: x_PK[parent_P, child_P], written)
        at = jnp.arange(len(parent_P)), jnp.where(moving_P, old.length_P, old.tokens_PS.shape[1])
        reads_PM = new.read_PM & moving_P[:, None]
        hidden_R1D, cache = lm.apply(
            params[0], new.tokens_PM.reshape(-1, 1), segments_BT=reads_PM.reshape(-1, 1).astype(jnp.int32),
            cache=old.cache,
        )  # fmt: skip
        kept = lambda new_P, old_P: jax.tree.map(partial(_where, moving_P), new_P, old_P)
        logits_PMV = lm.logits(params[0], hidden_R1D[:, 0]).reshape(texts.logits_PMV.shape)
        if program.contexts > 1 or waits:
            # Contexts may go without a token, and who is at a boundary waits for others.
            logits_PMV = jnp.where(reads_PM[..., None], logits_PMV, old.logits_PMV)
        return Texts(
            cache=cache, logits_PMV=logits_PMV,
            program_P=kept(new.program_P, old.program_P),
            tokens_PS=old.tokens_PS.at[at].set(new.tokens_PM[:, 0], mode="drop"), length_P=old.length_P + moving_P,
            log_twist_P=kept(new.log_twist_P, old.log_twist_P), finished_P=kept(new.finished_P, old.finished_P),
        )  # fmt: skip

    def take(texts: Texts, rows_N: Array) -> Texts:
        return _rows(program.contexts, texts, rows_N, lm.take_rows)

    return FeynmanKac(
        propose, commit, done=lambda texts: texts.finished_P | (texts.length_P >= texts.tokens_PS.shape[1]), take=take,
        twist=lambda texts: texts.log_twist_P, waits=waits,
        record=lambda written: written.tokens_PM[..., 0],
    )  # fmt: skip


def _step(
    program: Program, tables: Any, key: Key, logprobs_MV: Array, state: Any, log_twist: Array, length: Array
) -> tuple[Written, Array]:  # fmt: skip
    """One particle's step: what it has made, and the log of what its weight is multiplied by."""
    particle = Particle(key, logprobs_MV, tables, length)
    new = program.step(particle, state)
    began, ended = (str(jax.tree.structure(one)) for one in (state, new))
    check(began == ended, "state", ended, f"a step that returns one like Program.start, {began}")
    new = jax.tree.map(_like, state, new)
    tokens = [context.token for context in particle.contexts]
    check(tokens[0] is not None, "step", "no token", "one that is sampled or observed by p.context.next_token()")
    tokens_M = jnp.stack([jnp.int32(0) if token is None else token for token in tokens])
    read_M = jnp.asarray([token is not None for token in tokens]) & ~particle.finished
    twist = jnp.where(particle.finished, 0, particle.log_twist)
    written = Written(new, tokens_M, read_M, twist, particle.finished)
    return written, particle.log_weight + twist - log_twist


def _like(old: Array, new: Any) -> Array:
    """What a step has made of a part of its state, in the type that it began with."""
    kind, made = old.dtype, jnp.asarray(new)
    fine = made.shape == old.shape and jnp.promote_types(kind, made.dtype) == kind
    check(fine, "state", f"{made.dtype}{list(made.shape)}", f"{kind}{list(old.shape)}, as Program.start has it",
          "Begin with an array of the type and shape that the step makes.")  # fmt: skip
    return made.astype(kind)


def _where(moving_P: Array, new_P: Array, old_P: Array) -> Array:
    return jnp.where(moving_P.reshape(-1, *(1,) * (new_P.ndim - 1)), new_P, old_P)


def _rows(contexts: int, texts: Texts, rows_N: Array, take_cache: Callable[[Any, Array], Any]) -> Texts:
    """The chosen particles, each with the rows of all its contexts."""
    cache_rows = (rows_N[:, None] * contexts + jnp.arange(contexts)[None]).reshape(-1)
    rest = jax.tree.map(lambda x_P: x_P[rows_N], replace(texts, cache=()))
    return replace(rest, cache=take_cache(texts.cache, cache_rows))


def inherit(lm: LM, contexts: int, texts: Texts, parent_P: Array) -> Texts:
    """Particles as copies of their parents, who have to be as `at_home` orders them: a parent with children has one in
    its own place. A CPU then copies in place, and only rows that change hands: a fifth of a step less.
    """
    if platform() != "cpu":
        return _rows(contexts, texts, parent_P, lm.take_rows)

    @jax.custom_batching.custom_vmap
    def move(cache: Any, rows_R: Array) -> Any:
        changed_R = rows_R != jnp.arange(len(rows_R))
        to_R = jnp.nonzero(changed_R, size=len(rows_R), fill_value=len(rows_R))[0]
        copy = lambda i, cache: lm.put_rows(cache, to_R[i, None], lm.take_rows(cache, rows_R[to_R[i, None]]))
        return jax.lax.fori_loop(0, jnp.sum(changed_R), copy, cache)

    @move.def_vmap
    def _(size: int, batched: Any, cache: Any, rows_R: Array) -> tuple[Any, Any]:
        # Populations side by side would each wait for the one that changes most, and copy all of it every time.
        axes = jax.tree.map(lambda one: 0 if one else None, batched)
        return jax.vmap(lm.take_rows, in_axes=axes)(cache, rows_R), jax.tree.map(lambda _: True, batched[0])

    return _rows(contexts, texts, parent_P, move)


@lru_cache
def at_boundary(program: Program) -> Callable[[Texts], Array]:
    """The boundary of a program, for all particles."""
    boundary = program.boundary
    assert boundary is not None
    return lambda texts: jax.vmap(boundary)(texts.program_P)


def prepare(
    lm: LM, params: Params, program: Program, prompts: Sequence[np.ndarray], particles: int, longest: int
) -> tuple[FeynmanKac, Any]:  # fmt: skip
    """The model of a program, in blocks if it has a boundary, and its particles as they `begin`."""
    model, state = program_model(lm, program), begin(lm, params, program, prompts, particles, longest)
    if program.boundary is None:
        return model, state
    return in_blocks(model, at_boundary(program), longest), blocks(state, particles)


def infer(
    lm: LM, params: Params, program: Program, prompts: Sequence[np.ndarray], key: Key, driver: Driver, *,
    particles: int, tokens: int, stride: int = 0, stop: Callable[[], bool] = lambda: False,
) -> Iterator[Population]:  # fmt: skip
    """The particles of a program after every `stride` rounds (0: all at once); the last are `concluded`.

    prompts: one for each context, int32 [n]. tokens: that a particle may write at most. stop: asked after these rounds
    whether they are to be the last. Raises `UserError` as `begin`. What was given before is no longer there when the
    next is asked for.
    """
    check(particles >= 1, "particles", particles, "at least 1")
    lm, params = lm.for_decoding(params)
    both = params, program.tables
    model, state = prepare(lm, params, program, prompts, particles, tokens)
    now = population(model, driver, both, state, tokens)
    made, over = 0, False
    while not over:
        made += stride or tokens
        now = advance(model, driver, both, now, key, made)
        over = made >= tokens or bool(np.all(now.done_P)) or stop()
        yield concluded(model, now) if over else now
