"""Growing a TokenFormer: parameter tokens are added to a trained one (arXiv 2410.23168, "Progressive Model Scaling").

With new keys of zero the new scores are zero, the norm of the scores is what it was, and gelu(0) = 0: the function is
the same for any new values, provided that tau is kept. By softmax a score of zero has weight: such a model
does not grow.
"""

from dataclasses import fields, replace

import jax
import jax.numpy as jnp

from lmlab.core.errors import check
from lmlab.core.types import Array, Key, Params
from lmlab.models.config import GrowthConfig, ParameterTokens, TokenFormerConfig
from lmlab.models.tokenformer import tokenformer

TOKENS = "param_tokens"


def grown_config(small: TokenFormerConfig, counts: ParameterTokens, growth: GrowthConfig) -> TokenFormerConfig:
    """The model that `small` grows into with these numbers of parameter tokens."""
    reference = small.references if growth.tau == "keep" else ParameterTokens()
    return replace(small, parameter_tokens=counts, reference=reference)


def grow_params(
    params: Params, small: TokenFormerConfig, large: TokenFormerConfig, key: Key, growth: GrowthConfig
) -> Params:  # fmt: skip
    """Parameters of `large` that hold those of `small` as their first parameter tokens; all else is the same.

    large: see `grown_config`. key: of the new tokens. Raises `UserError` if it is no larger version of `small`.
    """
    check_growth(small, large)
    lm = tokenformer(large)
    fresh = lm.init(key)

    def grown(names: tuple[str, ...], new: Array, old: Array) -> Array:
        if TOKENS not in names:
            return old
        axis = names.index(TOKENS)
        new = jax.lax.slice_in_dim(new, old.shape[axis], new.shape[axis], axis=axis).astype(old.dtype)
        how = growth.keys if axis == len(names) - 1 else growth.values
        return jnp.concatenate([old, new if how == "normal" else jnp.zeros_like(new)], axis=axis)

    return jax.tree.map(grown, lm.axes, fresh, params, is_leaf=lambda leaf: isinstance(leaf, tuple))


def check_growth(small: TokenFormerConfig, large: TokenFormerConfig) -> None:
    """Raise `UserError` unless `large` is `small` with parameter tokens added, and of a kind that can grow."""
    check(small.normalisation != "softmax", "model.normalisation", "softmax", "l2_norm_gelu or gelu_l2_norm",
          "By softmax a new key of zero has weight: growth would change what the model computes.")  # fmt: skip
    free = {"parameter_tokens", "reference", "execution"}
    for name in (field.name for field in fields(small) if field.name not in free):
        old, new = getattr(small, name), getattr(large, name)
        check(old == new, f"model.{name}", new, f"{old!r}, as in the model that grows",
              "Growth adds parameter tokens and changes nothing else.")  # fmt: skip
    stacked = small.execution.stacked
    check(large.execution.stacked == stacked, "model.execution.stacked", not stacked, f"{stacked}, as before")
    for name in ("qkv", "proj", "ffn"):
        old, new = getattr(small.counts, name), getattr(large.counts, name)
        check(new >= old, f"model.parameter_tokens.{name}", new, f"at least {old}, as many as there are")
