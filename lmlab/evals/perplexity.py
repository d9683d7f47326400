"""Held-out values of an objective and of texts: sums over the whole set, one division at the end."""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import islice

import jax
import jax.numpy as jnp

from lmlab.core.errors import check
from lmlab.core.rng import key_for
from lmlab.core.sharding import constrain
from lmlab.core.types import Batch, Key, Objective, Params, Terms
from lmlab.inference.score import rolling, score
from lmlab.inference.text import TextCodec
from lmlab.models.lm import LM
from lmlab.train.step import make_evaluation, term_metrics


def make_held_out(
    objective: Objective, batches: Callable[[], Iterable[Batch]], key: Key, limit: int = 0
) -> Callable[[Params], dict[str, float]]:
    """`held_out(params) -> values`: loss, perplexity and the objective's metrics over all batches (or the first
    `limit`). Randomness of the objective is the same at every call, so that values compare.
    """
    evaluation = make_evaluation(objective)
    # Sums that every process of a job can read.
    terms_of = jax.jit(lambda *args: jax.tree.map(lambda x: constrain(x, ()), evaluation(*args)))

    def held_out(params: Params) -> dict[str, float]:
        total: Terms | None = None
        count = 0
        for count, batch in enumerate(islice(batches(), limit or None), start=1):
            # float64 on the host: float32 sums of millions of tokens would drop digits.
            terms = jax.tree.map(
                lambda x: float(x), jax.device_get(terms_of(params, batch, key_for(key, "eval", count)))
            )
            total = terms if total is None else jax.tree.map(lambda a, b: a + b, total, terms)
        if total is None:
            return {}
        weights = {name: term.weight for name, term in total.losses.items()}
        values = {name: float(value) for name, value in term_metrics(total, jnp.asarray(count), weights).items()}
        values.pop("weight")
        if "nll" in values:
            values["perplexity"] = math.exp(min(values["nll"], 700.0))
        return values

    return held_out


def text_values(
    lm: LM, params: Params, codec: TextCodec, texts: Sequence[str], *, stride: int = 0, batch_tokens: int = 4096
) -> dict[str, float]:  # fmt: skip
    """Values of texts under any model and tokenizer: nll (nats a token), perplexity (its exp), bits_per_byte.

    Every token is scored once, the first one after the tokenizer's `begin_ids` (else its end token), with the context
    that `rolling` gives it; bytes are those of the texts in UTF-8, so that models of different tokenizers compare.
    Ends of texts are neither predicted nor counted. stride: see `rolling`. Raises `UserError` for texts without tokens.
    """
    prefix = codec.begin_ids or codec.end_ids[:1]
    encoded = codec.encode_batch(list(texts))
    pairs = [window for tokens in encoded for window in rolling(tokens, prefix, lm.max_length, stride)]
    check(len(pairs) > 0, "texts", len(texts), "at least one text that is not empty")
    nats = -math.fsum(one.total for one in score(lm, params, pairs, batch_tokens=batch_tokens))
    nll = nats / sum(map(len, encoded))
    size = sum(len(text.encode()) for text in texts)
    return {"nll": nll, "perplexity": math.exp(min(nll, 700.0)), "bits_per_byte": nats / math.log(2) / size}
