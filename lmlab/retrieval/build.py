"""From an encoder's config to the encoder."""

from lmlab.retrieval.bert import minilm
from lmlab.retrieval.config import EncoderConfig, HashTfidf, MiniLM
from lmlab.retrieval.encoder import Encoder
from lmlab.retrieval.tfidf import hash_tfidf


def build_encoder(config: EncoderConfig) -> Encoder:
    """The encoder that a config describes. Raises `UserError`: its weights are not there."""
    match config:
        case HashTfidf():
            return hash_tfidf(config)
        case MiniLM():
            return minilm(config)
