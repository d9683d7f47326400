"""TokenFormer (arXiv 2410.23168): a decoder of fixed width whose layers attend to lists of parameters that can grow."""

from flax import linen as nn

from lmlab.core.masking import AttentionMask
from lmlab.core.sharding import constrain
from lmlab.core.types import Array
from lmlab.models.config import TokenFormerConfig
from lmlab.models.decoder import STREAM, Carry, decoder_lm
from lmlab.models.layers import attend, standardise
from lmlab.models.lm import LM
from lmlab.models.pattention import Pattention, QueryKeyValue


class Block(nn.Module):
    """One layer: queries, keys, values, the output and the feed-forward are attention to parameters."""

    config: TokenFormerConfig

    @nn.compact
    def __call__(
        self, carry: Carry, layer: int | Array, table: tuple[Array, Array] | None, mask: AttentionMask,
        places_BT: Array | None,
    ) -> tuple[Carry, None]:  # fmt: skip
        """X + out(attention(norm(x))), then x + ffn(norm(x)); the norms have no parameters."""
        config, (x_BTD, cache) = self.config, carry
        counts, references = config.counts, config.references
        norm = lambda x_BTD: standardise(x_BTD, config.norm, config.norm_eps).astype(x_BTD.dtype)
        q_BTNH, k_BTKH, v_BTKH = QueryKeyValue(config, name="attention")(norm(x_BTD))
        seen_BTNH, cache = attend(config, q_BTNH, k_BTKH, v_BTKH, table, mask, cache, layer, places_BT)
        seen_BTE = constrain(seen_BTNH.reshape(*x_BTD.shape[:2], -1), STREAM)
        x_BTD = x_BTD + Pattention(config, counts.proj, references.proj, name="out")(seen_BTE)
        x_BTD = constrain(x_BTD, STREAM)
        x_BTD = x_BTD + Pattention(config, counts.ffn, references.ffn, name="ffn")(norm(x_BTD))
        return (constrain(x_BTD, STREAM), cache), None


def tokenformer(config: TokenFormerConfig) -> LM:
    """The LM record of a TokenFormer. Raises `UserError` if the vocabulary is not known yet."""
    return decoder_lm(config, Block)
