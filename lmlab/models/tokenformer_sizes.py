"""The sizes of the paper (arXiv 2410.23168) and of the authors' configs, over a vocabulary of 50,304."""

from lmlab.models.config import AttentionConfig, ParameterTokens, TokenFormerConfig


def _size(layers: int, width: int, heads: int, tokens: int, length: int) -> TokenFormerConfig:
    return TokenFormerConfig(
        vocab_size=50304, layers=layers, width=width, max_length=length, attention=AttentionConfig(heads=heads),
        parameter_tokens=ParameterTokens(qkv=tokens),
    )  # fmt: skip


SIZES: dict[str, TokenFormerConfig] = {
    # Trained on the Pile, each for itself.
    "pile_150m": _size(12, 768, 12, 768, 2048),
    "pile_450m": _size(24, 1024, 16, 1024, 2048),
    "pile_900m": _size(32, 1280, 16, 1280, 2048),
    "pile_1500m": _size(40, 1536, 16, 1536, 2048),
    # On OpenWebText, each grown from the one before. The last two sizes make the parameters that the paper tells.
    "owt_124m": _size(12, 768, 12, 576, 1024),
    "owt_354m": _size(12, 768, 12, 2140, 1024),
    "owt_757m": _size(12, 768, 12, 4850, 1024),
    "owt_1400m": _size(12, 768, 12, 8620, 1024),
    # On OpenWebText2.
    "owt2_354m": _size(24, 1024, 16, 768, 1024),
    "owt2_757m": _size(24, 1024, 16, 1792, 1024),
}
