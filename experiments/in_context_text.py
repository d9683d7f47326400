"""In-Context Pretraining on real posts: how good each order is, and held-out loss of the four arms."""

import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.in_context_arms import trained_arms
from lmlab.core.errors import UserError
from lmlab.core.types import Params, TokenBatch
from lmlab.data.config import DataConfig, Files, InContextOrder, TrainedBPE
from lmlab.data.folders import cache_root
from lmlab.data.in_context import Related, arrange, order_documents, related_documents
from lmlab.data.open import Data, open_data
from lmlab.data.packing import lay_out, row_at, stack_rows
from lmlab.data.path_quality import path_quality
from lmlab.data.stream import train_stream
from lmlab.data.vectors import Corpus, corpus_of
from lmlab.models.config import AttentionConfig, TransformerConfig
from lmlab.models.lm import LM
from lmlab.models.transformer import transformer
from lmlab.objectives.next_token import next_token
from lmlab.retrieval.config import MiniLM
from lmlab.train.step import make_evaluation, ratio_value

RULES = {
    "random": {"tour": "random"}, "clusters": {"tour": "clusters"}, "released code": {"tour": "release"},
    "buffer chain": {"tour": "buffer_chain"}, "static degree": {"tour": "static"}, "dynamic degree": {},
    "dynamic, linked": {"link_fragments": True}, "greedy edges": {"tour": "greedy_edges"},
    "greedy edges, linked": {"tour": "greedy_edges", "link_fragments": True},
}  # fmt: skip
"""The ways to order, as changes of the default."""
MODEL = TransformerConfig(layers=4, width=128, max_length=512, attention=AttentionConfig(heads=4))


def text_config(path: str, smoke: bool) -> DataConfig:
    """Rows of posts."""
    vocabulary, length, rows = (512, 64, 2) if smoke else (2048, 512, 8)
    return DataConfig(
        sources={"posts": Files(path, heldout_percent=10)}, tokenizer=TrainedBPE(vocabulary), length=length,
        batch_size=rows, order="in_context",
    )  # fmt: skip


def post_groups(path: Path) -> list[str]:
    """The group of each post, by line."""
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        return [str(json.loads(line).get("group", "")) if line.strip() else "" for line in lines]


def order_table(data: Data, config: DataConfig, groups: Sequence[str]) -> dict[str, Any]:
    """Quality of every kind of order, for every encoder at hand."""
    cache = data.caches["train"]["posts"]
    corpus, heldout = (
        corpus_of(data.caches[split]["posts"], data.tokenizer, f"posts/{split}") for split in data.caches
    )
    group = np.asarray([groups[int(cache.document_id(i).rpartition(":")[2]) - 1] for i in range(cache.documents)])
    found: dict[str, Any] = {}
    for name, encoder in {"hash_tfidf": config.in_context.encoder, "minilm": MiniLM()}.items():
        settings = replace(config.in_context, encoder=encoder)
        try:
            related = related_documents(settings, corpus, cache_root(config.cache_dir), heldout=heldout)
        except UserError as error:
            found[name] = {"skipped": str(error)}
            continue
        found[name] = {"documents": related.counts, "orders": {
            rule: _quality(replace(settings, **changes), corpus, related, group, config.length)
            for rule, changes in RULES.items()
        }}  # fmt: skip
    return found


def _quality(
    settings: InContextOrder, corpus: Corpus, related: Related, group: np.ndarray, length: int
) -> dict[str, float]:  # fmt: skip
    path = arrange(settings, corpus, related, length, 0)
    mine = group[related.kept[path]]
    return path_quality(path, related.graph, related.vectors_nD) | {"same group": float(np.mean(mine[1:] == mine[:-1]))}


def heldout_rows(data: Data, config: DataConfig, order: np.ndarray) -> Iterator[TokenBatch]:
    """Whole batches of held-out rows, documents in this order."""
    cache = data.caches["heldout"]["posts"]
    packing = lay_out(cache.tokens_N, cache.offsets, length=config.length, order=order)
    for begin in range(0, packing.rows, config.batch_size):
        numbers = range(begin, min(begin + config.batch_size, packing.rows))
        yield stack_rows([row_at(packing, i) for i in numbers], config.batch_size, config.length + 1)


def run_text(config: DataConfig, seeds: int, steps: int) -> dict[str, Any]:
    """The table of orders, and held-out losses of the four arms."""
    data = open_data(config)
    posts = Path(config.sources["posts"].train)
    result: dict[str, Any] = {"orders": order_table(data, config, post_groups(posts)), "arms": {}}
    heldout = corpus_of(data.caches["heldout"]["posts"], data.tokenizer, "posts/heldout")
    related = np.asarray(order_documents(config.in_context, heldout, cache_root(config.cache_dir)).documents)
    rows = {"related": related, "random": np.random.default_rng(0).permutation(related)}
    # The same documents in both orders: what is a copy, or near held-out text, is in neither.
    chosen = np.asarray(data.orders["posts"].documents)
    paths = {"random": lambda seed: np.random.default_rng(seed).permutation(chosen), "related": lambda seed: chosen}
    streams = {
        order: [train_stream(replace(config, seed=seed), data.caches["train"], orders={"posts": path(seed)})
                for seed in range(seeds)]
        for order, path in paths.items()
    }  # fmt: skip
    model = replace(MODEL, vocab_size=data.tokenizer.vocab_size)
    for scope, lm, params in trained_arms(transformer(model), streams, steps, 3e-3):
        loss = mean_loss(lm)
        for order, mine in params.items():
            result["arms"][f"{order}, {scope}"] = {
                kind: loss(mine, heldout_rows(data, config, path)) for kind, path in rows.items()
            }
    return result


def mean_loss(lm: LM) -> Callable[[Params, Iterator[TokenBatch]], list[float]]:
    """Nats per token over batches, of every member of parameters [S, ...]."""
    evaluation = make_evaluation(next_token(lm))
    sums = jax.jit(jax.vmap(lambda params, batch: evaluation(params, batch, jax.random.key(0)).losses["next_token"],
                            (0, None)))  # fmt: skip

    def loss(params: Params, batches: Iterator[TokenBatch]) -> list[float]:
        total = jax.tree.map(lambda *x: sum(x), *(sums(params, batch) for batch in batches))
        return np.atleast_1d(np.asarray(jax.vmap(ratio_value)(total))).tolist()

    return loss
