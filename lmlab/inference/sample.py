"""Samples of any LM: prompts wait in a queue, a batch of rows is drawn, and who ends makes room for the next."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmlab.core.errors import check
from lmlab.core.types import Key, Params
from lmlab.inference.config import SamplingConfig
from lmlab.inference.engine import Decoding, bucket, decode, enter, idle, read_prompts, resize
from lmlab.inference.filters import Processor
from lmlab.models.lm import LM

STRIDE = 32
"""Tokens drawn between two looks at who has ended."""
LEAST_ROOM = 64

Stopped = Callable[[np.ndarray], int | None]
"""Given the tokens drawn for a row so far, how many of them to keep if the row is to stop, else None."""


class Sample(NamedTuple):
    """What was drawn for one prompt."""

    tokens: np.ndarray
    """int32 [n], without the end token."""
    logprobs: np.ndarray
    """float32 [n], under the model itself: before temperature and filters."""
    ended: bool
    """True if the end token or a stop came; False if the room ran out, or more is to come."""


class Update(NamedTuple):
    """News of one prompt."""

    number: int
    """Which of the prompts."""
    sample: Sample
    """All that was drawn for it so far."""
    finished: bool


@dataclass
class Row:
    """The prompt that has a row of the batch."""

    number: int
    prompt: np.ndarray
    limit: int
    """Tokens that it may hold, prompt and all."""


def sample(
    lm: LM, params: Params, prompts: Sequence[np.ndarray], key: Key, config: SamplingConfig, *,
    end_ids: tuple[int, ...] = (), stopped: Stopped = lambda tokens: None, processors: tuple[Processor, ...] = (),
    rows: int = 64,
) -> list[Sample]:  # fmt: skip
    """Continue each prompt (int32 [n], n >= 1) by up to `config.max_new_tokens` tokens. Arguments as `draw`."""
    news = draw(
        lm, params, prompts, key, config, end_ids=end_ids, stopped=stopped, processors=processors, rows=rows
    )  # fmt: skip
    found = {update.number: update.sample for update in news if update.finished}
    return [found[number] for number in range(len(prompts))]


def draw(
    lm: LM, params: Params, prompts: Sequence[np.ndarray], key: Key, config: SamplingConfig, *,
    end_ids: tuple[int, ...] = (), stopped: Stopped = lambda tokens: None, processors: tuple[Processor, ...] = (),
    rows: int = 64, stride: int = STRIDE,
) -> Iterator[Update]:  # fmt: skip
    """The same as a stream: news of every row that is being drawn, every `stride` tokens.

    end_ids: tokens each of which ends a sample. stopped: when else a row ends; asked every stride. processors: change
    the logits, see there. rows: how many prompts are drawn at once; the others wait until one of them ends. Prompts
    that are equal and stand together are read once.
    Row i is drawn with fold_in(key, i), whatever its neighbours. A row that fills the context ends there. Raises
    `UserError` for no prompt, an empty one, one that fills the context by itself, or tokens outside the vocabulary.
    """
    check(rows >= 1, "rows", rows, "at least 1")
    check(stride >= 1, "stride", stride, "at least 1")
    check_prompts(lm, prompts)
    # One type, since equal prompts are known by their bytes.
    prompts = [np.asarray(prompt, np.int32) for prompt in prompts]
    lm, params = lm.for_decoding(params)
    limits = [min(len(prompt) + config.max_new_tokens, lm.max_length) for prompt in prompts]
    queue = deque(Row(i, *both) for i, both in enumerate(zip(prompts, limits, strict=True)))
    slots: list[Row | None] = [None] * min(rows, len(prompts))
    state = None
    # Neither the number of tokens nor the stop texts are part of what is compiled.
    static = replace(config, max_new_tokens=1, stop=())
    while queue or any(slots):
        if queue and None in slots:
            state = _admit(lm, params, state, slots, queue, key, stride)
        assert state is not None
        state = _make_room(lm, state, slots, stride)
        state = decode(lm, params, state, static, end_ids, processors, stride)
        length_B, done_B = np.asarray(state.length_B), np.array(state.done_B)
        tokens_BS, logprobs_BS = np.asarray(state.tokens_BS), np.asarray(state.logprobs_BS)
        for slot, row in enumerate(slots):
            if row is None:
                continue
            new = slice(len(row.prompt), int(length_B[slot]))
            update = _look(row, tokens_BS[slot, new], logprobs_BS[slot, new], bool(done_B[slot]), stopped)
            if update.finished:
                slots[slot], done_B[slot] = None, True
            yield update
        state = replace(state, done_B=jnp.asarray(done_B))


def check_prompts(lm: LM, prompts: Sequence[np.ndarray]) -> None:
    """Raises `UserError` for prompts that cannot be continued; see `draw`."""
    lengths = [len(prompt) for prompt in prompts]
    some = bool(lengths) and min(lengths) >= 1
    check(some, "prompts", lengths, "at least one prompt, of at least one token each")
    check(max(lengths) < lm.max_length, "prompt", f"{max(lengths)} tokens",
          f"less than model.max_length = {lm.max_length}", "Shorten the prompt.")  # fmt: skip
    for prompt in map(np.asarray, prompts):
        outside = prompt[(prompt < 0) | (prompt >= lm.vocab_size)]
        check(not len(outside), "prompt", outside[:1].tolist(), f"token ids from 0 to {lm.vocab_size - 1}")


def _admit(
    lm: LM, params: Params, state: Decoding | None, slots: list[Row | None], queue: deque[Row], key: Key, stride: int
) -> Decoding:
    """Give the free slots to the next of the queue; equal prompts are read once."""
    free = [slot for slot, row in enumerate(slots) if row is None][: len(queue)]
    new = [queue.popleft() for _ in free]
    unique = {row.prompt.tobytes(): row.prompt for row in new}
    places = {name: place for place, name in enumerate(unique)}
    room = _room(lm, new, [len(row.prompt) for row in new], stride)
    room = max(room, 0 if state is None else state.tokens_BS.shape[1])
    read = read_prompts(lm, params, list(unique.values()), room)
    if state is None:
        state = idle(lm, len(slots), room, key)
    elif state.tokens_BS.shape[1] < room:
        state = resize(lm, state, room)
    # A power of two again: what is beyond goes to a slot that is not there.
    count = bucket(len(new), least=1)
    slots_N, source_N, prompt_N, limit_N, number_N = np.zeros((5, count), np.int32)
    prompts_NS = np.zeros((count, room), np.int32)
    slots_N[:] = len(slots)
    for n, (slot, row) in enumerate(zip(free, new, strict=True)):
        slots[slot] = row
        slots_N[n], source_N[n], number_N[n] = slot, places[row.prompt.tobytes()], row.number
        prompt_N[n], limit_N[n], prompts_NS[n, : len(row.prompt)] = len(row.prompt), row.limit, row.prompt
    keys_N = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, number_N)
    return enter(lm, state, read, source_N, slots_N, prompts_NS, prompt_N, limit_N, keys_N)


def _room(lm: LM, rows: Sequence[Row], lengths: Sequence[int], stride: int) -> int:
    """Places that rows of these lengths need for the next stride."""
    needed = max(min(length + stride, row.limit) for row, length in zip(rows, lengths, strict=True))
    room = bucket(needed, LEAST_ROOM)
    # Sizes in between, since a step reads every place of the cache.
    room = room * 3 // 4 if room > LEAST_ROOM and needed <= room * 3 // 4 else room
    return min(room, lm.max_length)


def _make_room(lm: LM, state: Decoding, slots: Sequence[Row | None], stride: int) -> Decoding:
    """A cache grows with its rows: a step takes as long as the places that it looks at are many."""
    lengths = np.asarray(state.length_B)
    held = [(row, int(lengths[slot])) for slot, row in enumerate(slots) if row is not None]
    room = _room(lm, [row for row, _ in held], [length for _, length in held], stride)
    return resize(lm, state, room) if room > state.tokens_BS.shape[1] else state


def _look(row: Row, tokens: Any, logprobs: Any, done: bool, stopped: Stopped) -> Update:
    """What is to be told of a row after a stride."""
    kept = stopped(tokens)
    size = len(tokens) if kept is None else min(kept, len(tokens))
    full = len(row.prompt) + size >= row.limit
    ended = kept is not None or (done and not full)
    return Update(row.number, Sample(tokens[:size].copy(), logprobs[:size].copy(), ended), done or kept is not None)
