"""The pre-norm transformer that covers Llama, Qwen, Mistral, GPT-2 and GPT-NeoX: its block, in the decoder of all."""

from flax import linen as nn

from lmlab.core.masking import AttentionMask
from lmlab.core.sharding import constrain
from lmlab.core.types import Array
from lmlab.models.config import TransformerConfig
from lmlab.models.decoder import STREAM, Carry, decoder_lm
from lmlab.models.layers import MLP, Norm, SelfAttention
from lmlab.models.lm import LM


class Block(nn.Module):
    """One layer."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self, carry: Carry, layer: int | Array, table: tuple[Array, Array] | None, mask: AttentionMask,
        places_BT: Array | None,
    ) -> tuple[Carry, None]:  # fmt: skip
        """X + attention(norm(x)), then x + mlp(norm(x)); or both from the same x if parallel."""
        config = self.config
        x_BTD, cache = carry
        norm = lambda name: Norm(config.norm, config.norm_eps, name=name)
        attended_BTD, cache = SelfAttention(config, name="attention")(
            norm("attention_norm")(x_BTD), table, mask, cache, layer, places_BT
        )
        if config.parallel_residual:
            x_BTD = x_BTD + attended_BTD + MLP(config, name="mlp")(norm("mlp_norm")(x_BTD))
        else:
            x_BTD = x_BTD + attended_BTD
            x_BTD = x_BTD + MLP(config, name="mlp")(norm("mlp_norm")(x_BTD))
        return (constrain(x_BTD, STREAM), cache), None


def transformer(config: TransformerConfig) -> LM:
    """The LM record of a transformer. Raises `UserError` if the vocabulary is not known yet."""
    return decoder_lm(config, Block)
