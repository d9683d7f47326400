"""In-Context Pretraining: an order of documents in which neighbours are related (arXiv 2310.10638).

texts -> vectors -> nearest neighbours -> copies left out -> graph -> tour -> the ordinary rows, which are shuffled.
Only the order changes: no document is in it twice, whatever the graph (tour = neighbours, a baseline, repeats some).
Each stage is a folder in the cache, named by a hash of what went into it. The vectors and the search, which take
nearly all the time, go on where they were when they are killed; graph and tour, minutes for a million documents, begin
anew.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lmlab import __version__
from lmlab.core.errors import check
from lmlab.data.baselines import cluster_order, neighbour_windows
from lmlab.data.buffer_chain import bm25_scorer, buffer_chain, vector_scorer
from lmlab.data.config import InContextOrder
from lmlab.data.duplicates import alike_pairs, drop_followers, equal_pairs, minhash_pairs, representatives
from lmlab.data.graph import Graph, build_graph, components, edges
from lmlab.data.linking import assemble, cut, greedy_edges, link_fragments
from lmlab.data.path_quality import path_quality
from lmlab.data.progress import advancing, say
from lmlab.data.stages import stage
from lmlab.data.tour import Tour, release, walk
from lmlab.data.vectors import Corpus, Neighbours, Vectors, encode_corpus, find_neighbours, text_batches
from lmlab.retrieval.build import build_encoder
from lmlab.retrieval.encoder import Encoder, unit_rows
from lmlab.retrieval.index import merge_pieces


@dataclass(frozen=True)
class Related:
    """The documents that stay, and how near they are to one another."""

    kept: np.ndarray
    """[n] rising numbers of the documents that stay."""
    graph: Graph
    """Of these, numbered from 0."""
    ids_NK: np.ndarray
    """Neighbours of every document, the nearest first."""
    vectors_nD: np.ndarray
    """Unit rows of the documents that stay, float32; the mean of a document's pieces."""
    counts: dict[str, int]
    """Documents, and how many went for which reason."""


@dataclass(frozen=True)
class Order:
    """An order, and what is known of it."""

    documents: np.ndarray
    """[n] int64 numbers of documents of the corpus, first to last, memory-mapped."""
    report: dict[str, Any]
    """Counts, quality, settings, versions."""
    folder: Path
    """Holds order.npy and report.json."""


def order_documents(
    config: InContextOrder, corpus: Corpus, root: Path, *, heldout: Corpus | None = None, length: int = 0,
    seed: int = 0, encoder: Encoder | None = None,
) -> Order:  # fmt: skip
    """The order of a corpus, from the cache or made now.

    Args:
        config: how.
        corpus: the documents.
        root: the folder for caches.
        heldout: what is near to these documents is left out, see `InContextOrder.heldout_threshold`.
        length: tokens of a row; read by `neighbours` and `buffer_chain`, which fill rows.
        seed: of the rules that draw.
        encoder: in place of the config's: any language model, for one (`pooled_encoder`).

    Raises:
        UserError: no document stays; weights or packages that are missing; a full disk.
    """
    # What a rule does not read must not make it anew.
    length = length if config.tour in ("neighbours", "buffer_chain") else 0
    seed = seed if config.tour in ("neighbours", "buffer_chain", "clusters", "random") else 0
    chosen = encoder or build_encoder(config.encoder)
    vectors, neighbours = _found(config, corpus, heldout, root, chosen)

    def build(folder: Path) -> None:
        related = relate(config, corpus, vectors, neighbours)
        path = arrange(config, corpus, related, length, seed)
        np.save(folder / "order.npy", related.kept[path])
        report = _report(config, related, path, seed)
        (folder / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
        say(f"order of {corpus.label}  {len(path):,} documents, similarity {report['similarity']:.3f}")

    inputs = {"neighbours": neighbours.key, "settings": repr(_relevant(config)), "length": length, "seed": seed}
    folder, _ = stage(root, "order", inputs, build)
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return Order(np.load(folder / "order.npy", mmap_mode="r"), report, folder)


def related_documents(
    config: InContextOrder, corpus: Corpus, root: Path, *, heldout: Corpus | None = None, encoder: Encoder | None = None
) -> Related:  # fmt: skip
    """The graph that an order of the same arguments goes along, for a look at it. Raises as `order_documents`."""
    found = _found(config, corpus, heldout, root, encoder or build_encoder(config.encoder))
    return relate(config, corpus, *found)


def _found(
    config: InContextOrder, corpus: Corpus, heldout: Corpus | None, root: Path, encoder: Encoder
) -> tuple[Vectors, Neighbours]:  # fmt: skip
    vectors = encode_corpus(config, corpus, encoder, root)
    other = None
    if heldout is not None and config.heldout_threshold <= 1:
        # The held-out texts are seen with the weights and the mean of the training texts.
        name = f"{encoder.fingerprint} fitted to {vectors.key}"
        fitted = replace(encoder, fit=lambda texts: encoder.fit(text_batches(corpus)), fingerprint=name)
        other = replace(encode_corpus(config, heldout, fitted, root), mean_D=vectors.mean_D)
    return vectors, find_neighbours(config, vectors, other, root, corpus.label)


def _relevant(config: InContextOrder) -> InContextOrder:
    """The config with what earlier stages have used up at its default, so that their keys speak for it."""
    return replace(config, encoder=InContextOrder().encoder, search=InContextOrder().search)


def relate(config: InContextOrder, corpus: Corpus, vectors: Vectors, neighbours: Neighbours) -> Related:
    """Leave out copies and what is held out, and tie the rest together. Raises `UserError`: nothing is left."""
    ids_NK, sims_NK, leak_N = neighbours.ids_MK, neighbours.sims_MK, neighbours.heldout_M
    if vectors.document_M is not None:
        ids_NK, sims_NK = merge_pieces(ids_NK, sims_NK, vectors.document_M, config.neighbours)
        leak_N = np.maximum.reduceat(leak_N, np.searchsorted(vectors.document_M, np.arange(corpus.count)))
    leaked = leak_N >= config.heldout_threshold
    rank_N = np.empty(corpus.count, np.int64)
    # What is near a held-out document stands for no other.
    first = np.lexsort((-corpus.sizes_N if config.keep == "longest" else np.zeros(corpus.count, int), leaked))
    rank_N[first] = np.arange(corpus.count)
    rows_ND = _documents(vectors)
    low, high = _copies(config, corpus, rows_ND, ids_NK, sims_NK)
    stands_for = representatives(low, high, rank_N, complete=config.linkage == "complete")
    copies = stands_for != np.arange(corpus.count)
    kept = np.flatnonzero(~copies & ~leaked)
    check(len(kept) > 0, "data.in_context.heldout_threshold", config.heldout_threshold,
          f"a threshold that leaves a document of {corpus.label}",
          f"All {corpus.count} are near to held-out ones.")  # fmt: skip
    graph = build_graph(
        ids_NK, sims_NK, kept, mutual=config.mutual, min_sim=config.min_sim, max_degree=config.max_degree
    )
    counts = {"documents": corpus.count, "held_out": int(np.sum(leaked)), "copies": int(np.sum(copies & ~leaked))}
    return Related(kept, graph, ids_NK, rows_ND[kept], counts)


def _documents(vectors: Vectors) -> Vectors | np.ndarray:
    """Unit rows of the documents: as they are on disk, or the means of their pieces."""
    if vectors.document_M is None:
        return vectors
    starts = np.searchsorted(vectors.document_M, np.arange(vectors.document_M[-1] + 1))
    return unit_rows(np.add.reduceat(vectors[:], starts, axis=0))


def _copies(
    config: InContextOrder, corpus: Corpus, rows_ND: Vectors | np.ndarray, ids_NK: np.ndarray, sims_NK: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    texts = (corpus.text(i) for i in range(corpus.count))
    match config.duplicates:
        case "cosine":
            low, high = alike_pairs(ids_NK, sims_NK, config.threshold)
            if isinstance(rows_ND, Vectors):
                return low, high
            # Documents with a piece in common, a licence, are near to one another but no copies.
            alike = np.sum(rows_ND[low] * rows_ND[high], axis=1) >= config.threshold
            return low[alike], high[alike]
        case "minhash":
            return minhash_pairs(texts, config.threshold)
        case "exact":
            return equal_pairs(texts)
    return np.zeros(0, np.int64), np.zeros(0, np.int64)


def arrange(config: InContextOrder, corpus: Corpus, related: Related, length: int, seed: int) -> np.ndarray:
    """The places of the kept documents, first to last, as `config.tour` says."""
    rng = np.random.default_rng(seed)
    kept, count = related.kept, len(related.kept)
    text = lambda i: corpus.text(int(kept[i]))
    match config.tour:
        case "neighbours":
            path = neighbour_windows(related.graph, corpus.sizes_N[kept], length, rng)
        case "clusters":
            path = cluster_order(related.vectors_nD, rng)
        case "random":
            path = rng.permutation(count)
        case "buffer_chain":
            score = bm25_scorer(text) if config.scorer == "bm25" else vector_scorer(related.vectors_nD)
            chain = buffer_chain(iter(rng.permutation(count)), score, corpus.sizes_N[kept], config.buffer, length)
            path = np.fromiter(chain, np.int64)
        case _:
            path = _tour(config, related, corpus.label).path
    if config.duplicates == "prefix_jaccard":
        return np.fromiter(drop_followers(path, text, config.threshold), np.int64)
    return path


def _tour(config: InContextOrder, related: Related, label: str) -> Tour:
    graph, count = related.graph, len(related.kept)
    if config.tour == "greedy_edges":
        links = greedy_edges(graph)
        return assemble(link_fragments(links, related.vectors_nD) if config.link_fragments else links)
    if config.tour == "release":
        number = np.full(len(related.ids_NK), -1, np.int64)
        number[related.kept] = np.arange(count)
        ids_NK = related.ids_NK[related.kept]
        tour = release(np.where(ids_NK >= 0, number[ids_NK], -1))
    else:
        with advancing(f"tour of {label}", count) as advance:
            tour = walk(graph, dynamic=config.tour == "dynamic", advance=advance)
    return assemble(link_fragments(cut(tour, count), related.vectors_nD)) if config.link_fragments else tour


def _report(config: InContextOrder, related: Related, path: np.ndarray, seed: int) -> dict[str, Any]:
    low, high, _ = edges(related.graph)
    counts = dict(related.counts)
    if config.tour != "neighbours":
        # What the path leaves out begins like its neighbour; a tour that repeats documents leaves out others as well.
        counts["copies"] += len(related.kept) - len(path)
    parts = len(np.unique(components(low, high, len(related.kept))))
    versions = {"lmlab": __version__, "numpy": np.__version__, "jax": jax.__version__}
    return {
        **counts, "ordered": len(path), "edges": len(low), "components": parts,
        **path_quality(path, related.graph, related.vectors_nD), "seed": seed, "settings": asdict(config),
        "versions": versions,
    }  # fmt: skip
