"""Held-out values of an objective: sums over the whole set, one division at the end."""

import math
from collections.abc import Callable, Iterable
from itertools import islice

import jax
import jax.numpy as jnp

from lmlab.core.rng import key_for
from lmlab.core.sharding import constrain
from lmlab.core.types import Batch, Key, Objective, Params, Terms
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
