"""The contract of a language model: a frozen record of pure functions over a plain dict of parameters."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from flax import struct

from lmlab.core.masking import AttentionMask
from lmlab.core.types import Array, Key, Params

Cache: TypeAlias = Any
"""What a model remembers of the tokens it has read: a pytree of static shape."""
Axes: TypeAlias = Any
"""The tree of the parameters with, at each leaf, the tuple of the logical names of its axes."""


class Apply(Protocol):
    """`apply(params, inputs, ...) -> (hidden_BTD, cache)`."""

    def __call__(
        self,
        params: Params,
        inputs: Array,
        *,
        positions_BT: Array | None = None,
        segments_BT: Array | None = None,
        mask: AttentionMask | None = None,
        cache: Cache | None = None,
    ) -> tuple[Array, Cache | None]:
        """Hidden states of a batch of rows.

        inputs: int [B, T] tokens, or float [B, T, D] embeddings. positions_BT: position of each token in
        its segment, rising from left to right (for any other order give a mask); default: index in the row,
        after what the cache holds. segments_BT: tokens see their own
        segment only, 0 is padding; default: one segment. mask: replaces the causal mask built from those two.
        cache: tokens are added to it and see what it holds; padding must be at the end of the row.
        Returns the normed hidden states [B, T, D] and the new cache (None without one).
        """  # fmt: skip
        ...


@dataclass(frozen=True, eq=False)
class LM:
    """A language model. Everything in lmlab that takes a model takes this record. Equal only to itself, so that
    it can be a static argument of `jax.jit`.
    """

    config: Any
    """The typed config that it was built from."""
    vocab_size: int
    max_length: int
    init: Callable[[Key], Params]
    """`init(key) -> params`."""
    apply: Apply
    embed: Callable[[Params, Array], Array]
    """`embed(params, tokens_BT) -> embeddings_BTD`, so that `apply` of either gives the same."""
    head: Callable[[Params], Params]
    """The part of the parameters that `logits` reads: `logits(head(params), h) == logits(params, h)`."""
    logits: Callable[[Params, Array], Array]
    """`logits(params, hidden_..D) -> logits_..V` in float32."""
    init_cache: Callable[[int, int], Cache]
    """`init_cache(batch, length)`: room for `length` tokens a row."""
    take_rows: Callable[[Cache, Array], Cache]
    """`take_rows(cache, rows_N)`: the cache of the chosen rows, repeats allowed."""
    put_rows: Callable[[Cache, Array, Cache], Cache]
    """`put_rows(cache, rows_N, other)`: the N rows of `other`, of the same room, in place of the chosen ones; rows
    beyond the last are dropped."""
    rewind: Callable[[Cache, Array], Cache]
    """`rewind(cache, length_B)`: all but the first `length_B` tokens of each row forgotten."""
    resize: Callable[[Cache, int], Cache]
    """`resize(cache, length)`: the same tokens, with room for `length` a row (no fewer than any row holds)."""
    for_decoding: Callable[[Params], tuple["LM", Params]]
    """`for_decoding(params) -> (lm, params)`: the same model in the form that draws tokens fastest on this machine,
    perhaps with a copy of the parameters; always the same LM. Its caches are its own."""
    axes: Axes
    """Logical axis names by parameter: embed, heads, kv_heads, head_dim, ffn, param_tokens, vocab, positions,
    norm;
    layers and stack are batch axes (a stack of matrices, each one for itself)."""


@struct.dataclass
class Reading:
    """Tokens that the trunk of a `MultiTokenLM` has read, for its heads to go on from."""

    trunk_BTD: Array
    """In float32, so that the gradients of all heads are added up in it."""
    chain_BTD: Array
    """What the head before has made of it, not normed."""
    mask: AttentionMask
    table: tuple[Array, Array] | None
    """Of the rotation at these positions in the heads' layers."""
    places_BT: Array | None
    cache: Cache | None


class Read(Protocol):
    """`read(params, inputs, ...) -> reading`."""

    def __call__(
        self,
        params: Params,
        inputs: Array,
        *,
        positions_BT: Array | None = None,
        segments_BT: Array | None = None,
        mask: AttentionMask | None = None,
        cache: Cache | None = None,
    ) -> Reading:
        """The trunk alone; arguments as of `Apply`, the cache one of all heads."""
        ...


@dataclass(frozen=True, eq=False)
class MultiTokenLM:
    """A model whose head i of n predicts the i-th next token (arXiv 2404.19737). Equal only to itself."""

    lm: LM
    """Head 1, a language model like any other. Its parameters are those of all heads; it reads its own."""
    heads: int
    """n."""
    read: Read
    head: Callable[[Params, int, Reading, Array], tuple[Array, Reading]]
    """`head(params, i, reading, following_BT) -> (hidden_BTD, reading)`: normed hidden states of head i, for
    `lm.logits`; heads are called in order from 1, each with the reading that the one before returned. following: the
    tokens (or embeddings) i - 1 places on; read by sequential modules only."""
    whole: LM
    """As `lm`, but its caches are those of all heads, and `apply` enters tokens for all.

    A sequential head reads what follows a token, and the last n - 1 tokens of a call are entered as if token 0 did: to
    go on with what really follows, rewind by so many and read them again with it (`read_prompts(again=)`).
    """
    for_decoding: Callable[[Params], tuple["MultiTokenLM", Params]]
    """As that of `lm`, for all heads."""
