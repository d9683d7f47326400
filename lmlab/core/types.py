"""The types that all packages share: batches of tokens, and the terms of a loss."""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
from flax import struct

Array: TypeAlias = jax.Array
Key: TypeAlias = jax.Array
"""A typed PRNG key (`jax.random.key`)."""
Params: TypeAlias = Mapping[str, Any]
"""Parameters: nested dicts of arrays."""
Batch: TypeAlias = Any
"""A pytree of arrays whose first axis is the batch."""


@struct.dataclass
class TokenBatch:
    """Packed rows of tokens. Any number of documents share a row; a segment is one (part of a) document.

    Rows hold the tokens that are read and those that are only predicted: an objective that looks n tokens
    ahead is given rows of length T + n.
    """

    tokens_BT: Array
    """int32 token ids."""
    segments_BT: Array
    """int32, 0 for padding, 1, 2, ... for the documents of the row from left to right."""
    positions_BT: Array
    """int32 position within the segment, from 0."""
    label_mask_BT: Array
    """bool, true where the token counts as a label (it must also have a token before it in its segment)."""


@struct.dataclass
class AnswerBatch:
    """Rows that hold prompts with their answers, and what is to be scored in them, S answers a row at most.

    Answers to one prompt may share it: then they stand behind it one after the other, each as if it were alone, and
    `branches_BT` keeps them apart. Or each has a copy of the prompt before it, and a segment of its own.
    """

    tokens_BT: Array
    """int32 token ids."""
    segments_BT: Array
    """int32, 0 for padding, 1, 2, ... for the prompts of the row from left to right, with what follows them."""
    positions_BT: Array
    """int32 position in its text: in an answer counted on from the end of the prompt."""
    branches_BT: Array | None
    """int32, 0 in a prompt, 1, 2, ... in its answers, which see it and themselves; None: each has its own segment."""
    labels_BA: Array
    """int32 tokens of the answers, to be predicted."""
    places_BA: Array
    """int32 places in the row that they are predicted from: those of the tokens before them in their text."""
    answers_BA: Array
    """int32 which of the row's answers, 1 to S, each of them belongs to; 0: none, the place is empty."""
    ends_BS: Array
    """int32 place of the last token of each answer; 0 where the row has fewer."""


@struct.dataclass
class Preferences:
    """Pairs of answers of which one was preferred: pair p of a row has the answers 2 p (preferred) and 2 p + 1."""

    answers: AnswerBatch
    weights_BP: Array
    """float32, how much the pair counts; 0 where the row has fewer."""
    targets_BP: Array
    """float32, the probability that the label is right: 1, or less for soft labels."""
    margins_BP: Array
    """float32, by how much the preferred answer is better."""
    reference_BS: Array | None
    """float32 log-probabilities of the answers under the reference, where they were computed before."""


@struct.dataclass
class TopK:
    """What a teacher says of places that were looked at before: k tokens, and all others together."""

    logprobs_BAK: Array
    """[B, A, k + 1] log-probabilities of the tokens `ids`, best first, and of all others together."""
    ids_BAK: Array
    """int32 [B, A, k]."""


@struct.dataclass
class Distillation:
    """Answers as a student reads them and as a teacher does, after other tokens; label [b, a] is the same in both."""

    student: AnswerBatch
    teacher: AnswerBatch | None
    """None where `stored` is there."""
    stored: TopK | None
    """The teacher's predictions of the labels, where they were made before."""
    weights_BA: Array
    """float32, how much the label counts; 0 where there is none."""


@struct.dataclass
class Ratio:
    """A quantity that is a quotient of two sums, so that it can be added up over devices and batches."""

    sum: Array
    """[] float32 numerator."""
    weight: Array
    """[] float32 denominator; a ratio of weight 0 counts as 0."""


@struct.dataclass
class Terms:
    """What an objective returns: `loss = sum over names of scale * sum / weight`, all sums global.

    The division is made once, by the train step, after the sums over microbatches and devices. Weights
    must not depend on the parameters; they are treated as constants.
    """

    losses: dict[str, Ratio]
    """Terms of the loss by name."""
    scales: dict[str, Array | float]
    """The coefficient of each term; same names."""
    metrics: dict[str, Ratio]
    """Further quantities to report; no gradient flows from them."""


Objective: TypeAlias = Callable[[Params, Batch, Key], Terms]
"""`objective(params, batch, key) -> Terms`: pure, differentiable in `params`."""
