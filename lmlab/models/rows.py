"""How a model reads a row of several documents: each for itself, or as one text."""

from dataclasses import replace
from typing import Any, Literal

import jax.numpy as jnp

from lmlab.core.masking import AttentionMask, self_attention_mask
from lmlab.core.types import Array, Params
from lmlab.models.lm import LM, Cache, MultiTokenLM

Scope = Literal["document", "row"]


def read_rows(lm: LM, attend: Scope = "document", positions: Scope = "document") -> LM:
    """The model with other attention or positions in packed rows; parameters and all else are the same.

    Attention across documents is what makes their order matter (arXiv 2310.10638); attention inside of documents is
    the usual baseline (arXiv 2402.13991). What counts as a label is left to the batch: the first token of a document
    is none either way. Calls without segments, with a cache or with a mask of their own are not changed.

    Args:
        lm: its config says the window of its attention.
        attend: "document": tokens see their own document; "row": all of the row before them.
        positions: "document": count from the start of each document in the row; "row": of the row.
    """
    return replace(lm, apply=_scoped(lm.apply, lm.config.attention.window, attend, positions))


def read_rows_with_heads(
    model: MultiTokenLM, attend: Scope = "document", positions: Scope = "document"
) -> MultiTokenLM:  # fmt: skip
    """As `read_rows`, for the trunk that all heads go on from."""
    return replace(model, read=_scoped(model.read, model.lm.config.attention.window, attend, positions))


def _scoped(read: Any, window: int, attend: Scope, positions: Scope) -> Any:
    """`LM.apply` or `MultiTokenLM.read` with these scopes; what it returns is not looked at."""
    if attend == positions == "document":
        return read

    def scoped(
        params: Params, inputs: Array, *, positions_BT: Array | None = None, segments_BT: Array | None = None,
        mask: AttentionMask | None = None, cache: Cache | None = None,
    ) -> Any:  # fmt: skip
        given: dict[str, Any] = {"positions_BT": positions_BT, "segments_BT": segments_BT}
        if segments_BT is not None and mask is None and cache is None:
            rows_BT = jnp.broadcast_to(jnp.arange(segments_BT.shape[1], dtype=jnp.int32)[None], segments_BT.shape)
            whole_BT = (segments_BT != 0).astype(jnp.int32)
            seen_BT = whole_BT if attend == "row" else segments_BT
            # A mask built from the positions takes them for the order of the tokens: with those that begin anew inside
            # of what is seen it would be wrong, so that one built from the places in the row goes with them.
            mask = self_attention_mask(rows_BT, seen_BT, window=window or None)
            given = {"positions_BT": rows_BT if positions == "row" else positions_BT, "segments_BT": seen_BT}
        return read(params, inputs, **given, mask=mask, cache=cache)

    return scoped
