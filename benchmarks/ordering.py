"""Time and memory of ordering documents: `python -m benchmarks.ordering`.

Vectors of 384 dimensions in clusters of about 50, one in twenty a near copy of another; 20 neighbours each, exactly;
copies left out; the walk of least degree; pieces linked. Everything passes through the folders of the cache, as in a
run. Each size is a process of its own, so that its peak of memory is its own. Prints a table with the law of growth
between sizes (seconds ~ documents^p), and as its last line one JSON object.

What 100 million documents would take. The search grows with the square of their number, all else about linearly. Two
cores of a shared AMD EPYC (AVX-512) search at 0.23 TFLOP/s (100,000 documents: 7.7e12 FLOP in 33 s, all stages 38 s).

- On disk: vectors in float16 1e8 x 384 x 2 = 77 GB; neighbours 1e8 x 20 x (4 + 4) = 16 GB; the order 0.8 GB.
- In one piece the search is 1e16 x 384 x 2 = 7.7e18 FLOP: 387 days of those two cores. A host with 8 GPUs, if they
  keep 200 TFLOP/s each, needs 7.7e18 / 1.6e15 = 1.3 hours, and 1e8 x 384 x 4 / 8 = 19 GB on each for the rows. The walk
  would hold 1e8 x 30 edges x 2 x 12 bytes = 72 GB of graph, and a heap of one entry an edge, in one process: that has
  to be divided.
- In shards: k-means on a sample gives 100 cells of about a million documents; each is a source of its own. A shard is
  1e12 x 384 x 2 = 7.7e14 FLOP: 56 minutes on two cores. 100 shards are 93 hours of two cores: on 10 hosts of 64 cores,
  320 pairs of cores, 17 minutes if the rate scales. A shard's graph, walk and linking took 4 s for 100,000 documents;
  for ten times as many, with the powers that the table ends in, about a minute. The paths of the shards are then laid
  end to end.
- What it costs: edges between shards are lost, a share that has to be measured on the corpus at hand. Instead, or
  besides, an index of faiss (`FaissSearch`): IVF65536 with 64 probes looks at one vector in 1024.
"""

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import numpy as np

SIZES = (10_000, 30_000, 100_000)
DIMENSIONS, NEIGHBOURS = 384, 20
STAGES = ("store", "search", "graph", "tour", "link")


def main() -> None:
    """Measure every size in a process of its own, or the one that is asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--documents", type=int, default=0, help="measure this size alone, in this process")
    asked = parser.parse_args().documents
    if asked:
        print(json.dumps(measure(asked)))
        return
    found = {}
    for size in SIZES:
        command = [sys.executable, "-m", "benchmarks.ordering", "--documents", str(size)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found[size] = json.loads(done.stdout.splitlines()[-1])
    report(found)


def measure(documents: int) -> dict[str, float]:
    """Seconds of each stage, their sum, and the peak of memory in GB."""
    from lmlab.data.config import InContextOrder
    from lmlab.data.in_context import relate
    from lmlab.data.linking import assemble, cut, link_fragments
    from lmlab.data.path_quality import path_quality
    from lmlab.data.tour import walk
    from lmlab.data.vectors import Corpus, encode_corpus, find_neighbours
    from lmlab.retrieval.encoder import Encoder

    vectors_ND = clusters(documents)
    encode = lambda texts: vectors_ND[[int(text) for text in texts]]
    encoder = Encoder(DIMENSIONS, f"clusters {documents}", lambda texts: encode)
    corpus = Corpus(documents, str, np.ones(documents, np.int64), f"{documents}", f"{documents:,}")
    config = InContextOrder(neighbours=NEIGHBOURS)
    with tempfile.TemporaryDirectory() as root:
        clock = [time.perf_counter()]
        stored = encode_corpus(config, corpus, encoder, Path(root))
        clock.append(time.perf_counter())
        neighbours = find_neighbours(config, stored, None, Path(root), corpus.label)
        clock.append(time.perf_counter())
        related = relate(config, corpus, stored, neighbours)
        clock.append(time.perf_counter())
        tour = walk(related.graph)
        clock.append(time.perf_counter())
        linked = assemble(link_fragments(cut(tour, len(tour.path)), related.vectors_nD))
        clock.append(time.perf_counter())
    seconds = dict(zip(STAGES, (after - before for before, after in pairwise(clock)), strict=True))
    # Linux counts in KiB.
    gigabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    quality = path_quality(linked.path, related.graph, related.vectors_nD)
    return {**seconds, "total": sum(seconds.values()), "gb": gigabytes, "similarity": quality["similarity"],
            "kept": len(related.kept)}  # fmt: skip


def clusters(documents: int) -> np.ndarray:
    """float32 [N, D] unit rows: clusters of about 50 with noise, one in twenty a near copy of another row."""
    rng = np.random.default_rng(0)
    centres_CD = rng.standard_normal((max(documents // 50, 1), DIMENSIONS), np.float32)
    rows_ND = centres_CD[rng.integers(0, len(centres_CD), documents)]
    rows_ND += rng.standard_normal(rows_ND.shape, np.float32)
    copies = rng.choice(documents, documents // 20, replace=False)
    noise = 0.1 * rng.standard_normal((len(copies), DIMENSIONS), np.float32)
    rows_ND[copies] = rows_ND[rng.integers(0, documents, len(copies))] + noise
    return rows_ND / np.linalg.norm(rows_ND, axis=1, keepdims=True)


def report(found: dict[int, dict[str, float]]) -> None:
    """Print the table, the law of growth, and the JSON line."""
    columns = (*STAGES, "total", "gb", "similarity")
    print(f"{'documents':>10s}" + "".join(f"{name:>12s}" for name in columns))
    for size, row in found.items():
        print(f"{size:10,d}" + "".join(f"{row[name]:12.3f}" for name in columns))
    for (small, one), (large, other) in pairwise(found.items()):
        powers = (growth(small, one[name], large, other[name]) for name in columns[:-1])
        print(f"{'power':>10s}" + "".join(f"{power:12.2f}" for power in powers) + f"   {small:,} to {large:,}")
    largest = found[max(found)]
    flops = 2 * DIMENSIONS * max(found) ** 2
    print(f"search: {flops / largest['search'] / 1e9:.0f} GFLOP/s at {max(found):,} documents")
    print(json.dumps({"seconds_100k": round(largest["total"], 1), "gb_100k": round(largest["gb"], 2)}))


def growth(small: int, before: float, large: int, after: float) -> float:
    """The p of `value ~ documents^p` between two sizes."""
    return math.log(after / before) / math.log(large / small)


if __name__ == "__main__":
    main()
