"""Contexts and continuations as tokens, cut where lm-evaluation-harness cuts them."""

from collections.abc import Callable, Sequence

import numpy as np

from lmlab.inference.score import Pair

Encode = Callable[[list[str]], list[np.ndarray]]
"""Texts to int32 ids."""


def encode_pairs(encode: Encode, prefix: Sequence[int], texts: Sequence[tuple[str, str]]) -> list[Pair]:
    """Tokens of each (context, continuation), of which the two texts joined are encoded in one.

    The continuation is what the joined text has more than the context, so that tokens are those a model has learnt
    from; blanks at the end of a context belong to the continuation. `prefix` comes before every context.
    """
    split = [(context.rstrip(), context[len(context.rstrip()) :] + continuation) for context, continuation in texts]
    # Choices of one question share a context: it is encoded once.
    contexts = list(dict.fromkeys(context for context, _ in split))
    encoded = encode(contexts + [context + continuation for context, continuation in split])
    sizes = {context: len(ids) for context, ids in zip(contexts, encoded[: len(contexts)], strict=True)}
    before = np.asarray(prefix, np.int32)
    joined = zip(split, encoded[len(contexts) :], strict=True)
    return [
        (np.concatenate([before, ids[: sizes[context]]]), np.asarray(ids[sizes[context] :]))
        for (context, _), ids in joined
    ]
