"""Log-probabilities of continuations under any LM, many pairs at a time."""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from lmlab.core.errors import check
from lmlab.core.types import Array, Params
from lmlab.inference.engine import bucket
from lmlab.models.lm import LM, Cache

Pair: TypeAlias = tuple[np.ndarray, np.ndarray]
"""Tokens of a context and of what follows it, int32 [m] and [n], m and n >= 1."""
WIDTH = 256
"""Places of a row that short pairs share."""
CHUNK = 128
"""Places whose logits are alive at a time."""


class Scored(NamedTuple):
    """What a model says of one continuation."""

    logprobs: np.ndarray
    """float32 [n], of each token given all before it, in nats."""
    greedy: bool
    """Whether every token is the most probable one, so that greedy decoding would have written them."""

    @property
    def total(self) -> float:
        """Log-probability of the whole continuation."""
        return float(self.logprobs.sum(dtype=np.float64))


class _Piece(NamedTuple):
    """Tokens read one after the other."""

    pair: int
    """Index of the pair that they belong to."""
    tokens: np.ndarray
    labels: np.ndarray
    """What is to be scored: the last of them comes after the last token, and so on backwards."""
    start: int = 0
    """Tokens of the pair that the cache holds before these."""


def score(
    lm: LM, params: Params, pairs: Sequence[Pair], *, share_contexts: bool = False, batch_tokens: int = 4096
) -> list[Scored]:
    """Score the continuation of each pair given its context, in the order of the pairs.

    share_contexts: read a context that several pairs have once, into a cache that their continuations go on from
    (the choices of one question). Otherwise short pairs share rows as segments that do not see each other. The values
    do not depend on it, nor on the other pairs. batch_tokens: places computed at a time.
    Raises `UserError` for a pair with an empty side, of more than lm.max_length + 1 tokens (the last is only
    predicted), or of tokens outside the vocabulary.
    """
    for context, continuation in pairs:
        _check_pair(lm, context, continuation)
    check(batch_tokens >= 1, "batch_tokens", batch_tokens, "at least 1")
    batches = _after_contexts if share_contexts else _in_rows
    scored: dict[int, Scored] = {}
    for batch in batches(lm, params, pairs, batch_tokens):
        scored.update(batch)
    return [scored[i] for i in range(len(pairs))]


def rolling(tokens_T: np.ndarray, prefix: Sequence[int], max_length: int, stride: int = 0) -> list[Pair]:
    """Windows of at most `max_length` read tokens in which every token of a text is scored once.

    The first window begins with `prefix` (at least one token: something must come before the first). Each one after
    it scores up to `stride` tokens, given as many before them as there is room for; 0: as many as it can hold, so that
    all but the last share no token. This is `loglikelihood_rolling` of lm-evaluation-harness.
    """
    stride = stride or max_length
    check(1 <= len(prefix) <= max_length, "prefix", list(prefix), f"from 1 to {max_length} tokens")
    check(1 <= stride <= max_length, "stride", stride, f"from 1 to {max_length}, or 0")
    whole = np.concatenate([np.asarray(prefix, np.int32), np.asarray(tokens_T, np.int32)])
    windows, done = [], len(prefix)
    while done < len(whole):
        stop = min(len(whole), max_length + 1 if done == len(prefix) else done + stride)
        windows.append((whole[max(0, stop - max_length - 1) : done], whole[done:stop]))
        done = stop
    return windows


def _check_pair(lm: LM, context: np.ndarray, continuation: np.ndarray) -> None:
    check(len(context) >= 1, "context", [], "at least one token", "Begin with the tokenizer's begin_ids.")
    check(len(continuation) >= 1, "continuation", [], "at least one token")
    size, most = len(context) + len(continuation), lm.max_length + 1
    check(size <= most, "context and continuation", f"{size} tokens", f"at most model.max_length + 1 = {most}",
          "Shorten the context, or score windows (rolling).")  # fmt: skip
    tokens = np.concatenate([context, continuation])
    outside = tokens[(tokens < 0) | (tokens >= lm.vocab_size)]
    check(not len(outside), "tokens", outside[:1].tolist(), f"token ids from 0 to {lm.vocab_size - 1}")


def _in_rows(lm: LM, params: Params, pairs: Sequence[Pair], batch_tokens: int) -> Iterator[dict[int, Scored]]:
    """Every pair as one segment of a row."""
    pieces = [_Piece(i, np.concatenate(pair)[:-1], np.asarray(pair[1])) for i, pair in enumerate(pairs)]
    for width, rows in _pack(pieces, lm.max_length).items():
        for batch in _split(rows, batch_tokens // width):
            yield _score_rows(lm, params, batch, width)


def _pack(pieces: Sequence[_Piece], limit: int) -> dict[int, list[list[_Piece]]]:
    """Rows by width: longest pieces first, each into the row with the least room for it (best fit decreasing).

    A new row is as wide as the power of two that holds its first piece, and short pieces fill up what that leaves.
    """
    least = min(WIDTH, bucket(sum(len(piece.tokens) for piece in pieces) or 1))
    rows: list[tuple[int, list[_Piece]]] = []
    free: list[tuple[int, int]] = []
    for piece in sorted(pieces, key=lambda piece: -len(piece.tokens)):
        size = len(piece.tokens)
        at = bisect_left(free, (size, 0))
        if at == len(free):
            rows.append((min(bucket(size, least), limit), []))
            room, row = rows[-1][0], len(rows) - 1
        else:
            room, row = free.pop(at)
        rows[row][1].append(piece)
        insort(free, (room - size, row))
    packed: dict[int, list[list[_Piece]]] = {}
    for width, row_pieces in rows:
        packed.setdefault(width, []).append(row_pieces)
    return packed


def _after_contexts(lm: LM, params: Params, pairs: Sequence[Pair], batch_tokens: int) -> Iterator[dict[int, Scored]]:
    """Every context, all but its last token, once in a cache; that token and the continuation after it."""
    sharing: dict[bytes, list[int]] = {}
    for i, (context, _) in enumerate(pairs):
        sharing.setdefault(np.asarray(context, np.int32).tobytes(), []).append(i)
    groups: dict[int, list[list[int]]] = {}
    for indices in sharing.values():
        width = min(bucket(len(pairs[indices[0]][0])), lm.max_length)
        groups.setdefault(width, []).append(indices)
    for width, members in sorted(groups.items(), reverse=True):
        for batch in _split(members, batch_tokens // width):
            after = min(bucket(max(len(pairs[i][1]) for indices in batch for i in indices), 1), lm.max_length)
            shape = bucket(len(batch), 1), width
            tokens_BT, segments_BT = np.zeros((2, *shape), np.int32)
            for row, indices in enumerate(batch):
                context = pairs[indices[0]][0][:-1]
                tokens_BT[row, : len(context)] = context
                segments_BT[row, : len(context)] = 1
            cache = read_contexts(lm, params, tokens_BT, segments_BT, min(width + after, lm.max_length))
            owners = [(row, i) for row, indices in enumerate(batch) for i in indices]
            for part in _split(owners, min(batch_tokens // after, 4 * shape[0])):
                pieces = [[_continuation(i, *pairs[i])] for _, i in part]
                yield _score_rows(lm, params, pieces, after, cache, [row for row, _ in part])


def _continuation(pair: int, context: np.ndarray, continuation: np.ndarray) -> _Piece:
    tokens = np.concatenate([context[-1:], continuation[:-1]])
    return _Piece(pair, tokens, np.asarray(continuation), start=len(context) - 1)


def _split(items: list, size: int) -> Iterator[list]:
    """Runs of at most `size` items, a power of two, so that their shapes are few."""
    size = 1 << (max(size, 1).bit_length() - 1)
    return (items[start : start + size] for start in range(0, len(items), size))


def _score_rows(
    lm: LM, params: Params, rows: Sequence[Sequence[_Piece]], width: int, cache: Cache = None,
    cache_rows: Sequence[int] = (),
) -> dict[int, Scored]:  # fmt: skip
    """Score the pieces of each row, after the given rows of the cache if there is one."""
    batch = bucket(len(rows), 1)
    tokens_BT, segments_BT, positions_BT = np.zeros((3, batch, width), np.int32)
    places, labels = [], []
    for row, pieces in enumerate(rows):
        stop = 0
        for number, piece in enumerate(pieces, start=1):
            here = slice(stop, stop + len(piece.tokens))
            stop = here.stop
            tokens_BT[row, here] = piece.tokens
            segments_BT[row, here] = number
            positions_BT[row, here] = piece.start + np.arange(len(piece.tokens))
            places.append(row * width + np.arange(stop - len(piece.labels), stop))
            labels.append(piece.labels)
    count = sum(map(len, labels))
    places_N, labels_N = np.zeros((2, -(-batch * width // CHUNK) * CHUNK), np.int32)
    places_N[:count], labels_N[:count] = np.concatenate(places), np.concatenate(labels)
    rows_B = np.zeros(batch, np.int32)
    rows_B[: len(cache_rows)] = cache_rows
    found = score_places(
        lm, params, (cache, rows_B), tokens_BT, segments_BT, positions_BT, places_N, labels_N, np.int32(count)
    )
    logprobs_N, best_N = (np.asarray(x)[:count] for x in found)
    cuts = np.cumsum([len(label) for label in labels])[:-1]
    pieces = [piece for row in rows for piece in row]
    parts = zip(pieces, np.split(logprobs_N, cuts), np.split(best_N, cuts), strict=True)
    return {piece.pair: Scored(logprobs, bool(best.all())) for piece, logprobs, best in parts}


@partial(jax.jit, static_argnums=(0, 4))
def read_contexts(lm: LM, params: Params, tokens_BT: Array, segments_BT: Array, room: int) -> Cache:
    """A cache with `room` places a row that holds the tokens of segment 1."""
    return lm.apply(params, tokens_BT, segments_BT=segments_BT, cache=lm.init_cache(tokens_BT.shape[0], room))[1]


@partial(jax.jit, static_argnums=0)
def score_places(
    lm: LM, params: Params, held: tuple[Cache, Array], tokens_BT: Array, segments_BT: Array, positions_BT: Array,
    places_N: Array, labels_N: Array, count: Array,
) -> tuple[Array, Array]:  # fmt: skip
    """Log p(label) after the first `count` of the places (numbered through the rows), float32 [N], and whether the
    label is the best token, bool [N].

    held: a cache (or None) and the row of it that each row of tokens goes on from. Logits are made of the places asked
    for only, `CHUNK` of them at a time; N is a multiple of it.
    """
    cache, rows_B = held
    cache = None if cache is None else lm.take_rows(cache, rows_B)
    hidden_BTD, _ = lm.apply(params, tokens_BT, positions_BT=positions_BT, segments_BT=segments_BT, cache=cache)
    hidden_ND = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])

    def score_chunk(i: Array, found: tuple[Array, Array]) -> tuple[Array, Array]:
        chunk = lambda x_N: jax.lax.dynamic_slice_in_dim(x_N, i * CHUNK, CHUNK)
        logits_CV = lm.logits(params, hidden_ND[chunk(places_N)])
        # Not a gather: XLA cannot always divide one over the vocabulary.
        is_label_CV = jax.lax.broadcasted_iota(jnp.int32, logits_CV.shape, 1) == chunk(labels_N)[:, None]
        label_C = jnp.sum(jnp.where(is_label_CV, logits_CV, 0), axis=-1)
        values = label_C - jax.nn.logsumexp(logits_CV, axis=-1), jnp.argmax(logits_CV, axis=-1) == chunk(labels_N)
        return jax.tree.map(lambda x_N, new_C: jax.lax.dynamic_update_slice(x_N, new_C, (i * CHUNK,)), found, values)

    start = jnp.zeros(places_N.shape, jnp.float32), jnp.zeros(places_N.shape, bool)
    return jax.lax.fori_loop(0, -(-count // CHUNK), score_chunk, start)
