"""In-Context Pretraining on topics: is a value looked up in an earlier document of the window?"""

import hashlib
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.in_context_arms import trained_arms
from lmlab.core.types import Array, Params
from lmlab.data.cache import TokenCache
from lmlab.data.config import DataConfig, Files, InContextOrder
from lmlab.data.folders import cache_root
from lmlab.data.in_context import order_documents
from lmlab.data.stream import Stream, train_stream
from lmlab.data.vectors import Corpus
from lmlab.models.config import AttentionConfig, MLPConfig, TransformerConfig
from lmlab.models.lm import LM
from lmlab.models.transformer import transformer
from lmlab.retrieval.encoder import Encoder, unit_rows

KEYS, VALUES, PAIRS, SHOWN, COPIES = 16, 16, 6, 4, 8
"""Keys and values there are; pairs of a topic, pairs in a document, documents of a topic."""
SIZE, WINDOW, ROWS = 1 + 2 * SHOWN, 4, 64
"""Tokens of a document, documents of a window, windows of a batch."""
MODEL = TransformerConfig(
    vocab_size=1 + KEYS + VALUES, layers=2, width=64, max_length=SIZE * WINDOW, positions="learned", norm="layer",
    attention=AttentionConfig(heads=4), mlp=MLPConfig(activation="gelu"),
)  # fmt: skip


def topic_documents(topics: int, copies: int, rng: np.random.Generator) -> np.ndarray:
    """int32 [topics * copies, SIZE]: 0, then keys (from 1) and values (from 1 + KEYS) in turn; topic by topic."""
    keys = np.argsort(rng.random((topics, KEYS)), axis=1)[:, :PAIRS]
    values = rng.integers(0, VALUES, (topics, PAIRS))
    chosen = np.argsort(rng.random((topics, copies, PAIRS)), axis=2)[..., :SHOWN]
    documents = np.zeros((topics, copies, SIZE), np.int32)
    documents[..., 1::2] = 1 + np.take_along_axis(keys[:, None], chosen, axis=2)
    documents[..., 2::2] = 1 + KEYS + np.take_along_axis(values[:, None], chosen, axis=2)
    return documents.reshape(-1, SIZE)


def pair_encoder(documents_NS: np.ndarray) -> Encoder:
    """Tf-idf of (key, value) pairs; the text of a document is its number."""
    pair = (documents_NS[:, 1::2] - 1) * VALUES + documents_NS[:, 2::2] - 1 - KEYS
    counts = np.zeros((len(pair), KEYS * VALUES), np.float32)
    np.put_along_axis(counts, pair, 1, axis=1)
    vectors_ND = unit_rows(counts * np.log((1 + len(counts)) / (1 + counts.sum(axis=0, keepdims=True))))
    name = f"pairs {hashlib.blake2b(documents_NS.tobytes()).hexdigest()}"
    return Encoder(KEYS * VALUES, name, lambda texts: lambda some: vectors_ND[[int(text) for text in some]])


def topic_streams(topics: int, seed: int) -> tuple[dict[str, Stream], dict[str, float]]:
    """The same documents at random and as the whole pipeline orders them, and how good that order is."""
    rng = np.random.default_rng(seed)
    documents_NS = topic_documents(topics, COPIES, rng)
    topic = np.repeat(np.arange(topics), COPIES)
    mixed = rng.permutation(len(documents_NS))
    documents_NS, topic = documents_NS[mixed], topic[mixed]
    count = len(documents_NS)
    corpus = Corpus(count, str, np.full(count, SIZE), f"topics {topics} {seed}", f"topics, seed {seed}")
    config = InContextOrder(neighbours=10, duplicates="none")
    order = order_documents(config, corpus, cache_root(), encoder=pair_encoder(documents_NS))
    cache = TokenCache(documents_NS.ravel(), np.arange(count + 1) * SIZE, str, count, corpus.fingerprint)
    data = DataConfig(sources={"topics": Files("")}, length=SIZE * WINDOW, batch_size=ROWS, seed=seed)
    orders = {"random": rng.permutation(count), "related": np.asarray(order.documents)}
    path = orders["related"]
    quality = {key: order.report[key] for key in ("similarity", "jumps", "ratio")}
    quality["same topic"] = float(np.mean(topic[path[1:]] == topic[path[:-1]]))
    return {name: train_stream(data, {"topics": cache}, orders={"topics": x}) for name, x in orders.items()}, quality


def value_losses(lm: LM, params: Params) -> tuple[Array, Array]:
    """Loss on values by place of the document [WINDOW], and on those whose key an earlier document showed [].

    Windows of related documents of topics that no training has seen.
    """
    documents = topic_documents(64, WINDOW, np.random.default_rng(10**6)).reshape(64, WINDOW, SIZE)
    keys = documents[..., 1::2]
    seen = np.stack([np.stack([np.isin(row[d], row[:d]) for d in range(WINDOW)]) for row in keys])
    tokens_BT = jnp.asarray(documents.reshape(64, -1))
    places_BT = jnp.broadcast_to(jnp.arange(WINDOW * SIZE)[None], tokens_BT.shape)
    hidden_BTD, _ = lm.apply(params, tokens_BT, segments_BT=places_BT // SIZE + 1, positions_BT=places_BT % SIZE)
    losses_BT = optax.softmax_cross_entropy_with_integer_labels(lm.logits(params, hidden_BTD[:, :-1]), tokens_BT[:, 1:])
    values_BWV = losses_BT[:, value_places()].reshape(64, WINDOW, SHOWN)
    return jnp.mean(values_BWV, axis=(0, 2)), jnp.sum(values_BWV * seen) / np.sum(seen)


def value_places() -> np.ndarray:
    """Where the losses of the values of a window stand: the place of the key that each follows."""
    return (np.arange(WINDOW)[:, None] * SIZE + np.arange(1, SIZE, 2)[None]).ravel()


def run_topics(seeds: int, topics: int, steps: int) -> dict[str, Any]:
    """The four arms on topics: losses by place for every seed."""
    made = [topic_streams(topics, seed) for seed in range(seeds)]
    streams = {order: [found[order] for found, _ in made] for order in ("random", "related")}
    result: dict[str, Any] = {"order": [quality for _, quality in made], "chance": math.log(VALUES), "arms": {}}
    for scope, lm, params in trained_arms(transformer(MODEL), streams, steps, 2e-3):
        score = jax.jit(jax.vmap(partial(value_losses, lm)))
        for order, mine in params.items():
            places, answerable = (np.asarray(x).tolist() for x in score(mine))
            result["arms"][f"{order}, {scope}"] = {"by place": places, "answerable": answerable}
    return result
