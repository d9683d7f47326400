"""From the config of any model to its LM record."""

from lmlab.models.config import ModelConfig, TokenFormerConfig
from lmlab.models.lm import LM
from lmlab.models.tokenformer import tokenformer
from lmlab.models.transformer import transformer


def language_model(config: ModelConfig) -> LM:
    """The LM that a config describes. Raises `UserError` if the vocabulary is not known yet."""
    return tokenformer(config) if isinstance(config, TokenFormerConfig) else transformer(config)
