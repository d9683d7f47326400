"""A path through all documents along the edges of their graph (arXiv 2310.10638, algorithm 1, and other rules)."""

import heapq
from dataclasses import dataclass

import numpy as np

from lmlab.data.graph import Graph
from lmlab.data.progress import Advance

_TOLD = 16384


@dataclass(frozen=True)
class Tour:
    """An order of documents."""

    path: np.ndarray
    """[N] int64, every document once."""
    jumps: np.ndarray
    """[J] int64 places of the path where it begins or goes on without an edge, 0 first."""


def walk(graph: Graph, *, dynamic: bool = True, advance: Advance | None = None) -> Tour:
    """The paper's rule: go on to the most similar document that is not visited; where there is none, jump to the
    unvisited document of least degree, which would be the next to lose all its neighbours. Ties: the lower number.

    dynamic: degree counts unvisited neighbours only; else all of them. O(E log N): a heap whose old entries are
    passed over. advance: is told now and then how many documents are visited.
    """
    count = graph.documents
    path, jumps, unvisited = np.empty(count, np.int64), [], np.ones(count, bool)
    degrees = np.diff(graph.starts)
    # Degree and number are one integer, degree first: cheaper to compare than a pair, and sorted as it stands.
    heap = np.sort(degrees * count + np.arange(count)).tolist()
    starts, neighbours = graph.starts.tolist(), graph.neighbours
    here = -1
    for place in range(count):
        if here < 0:
            here = _least(heap, degrees, unvisited)
            jumps.append(place)
        path[place] = here
        unvisited[here] = False
        row = neighbours[starts[here] : starts[here + 1]]
        free = row[unvisited[row]]
        here = int(free[0]) if len(free) else -1
        if dynamic and len(free):
            degrees[free] -= 1
            for key in (degrees[free] * count + free).tolist():
                heapq.heappush(heap, key)
        if advance and (place + 1) % _TOLD == 0:
            advance(place + 1)
    return Tour(path, np.asarray(jumps, np.int64))


def _least(heap: list[int], degrees: np.ndarray, unvisited: np.ndarray) -> int:
    """The unvisited document of least degree; takes it off the heap, with the old entries above it."""
    while True:
        degree, here = divmod(heapq.heappop(heap), len(degrees))
        if unvisited[here] and degrees[here] == degree:
            return here


def release(ids_NK: np.ndarray, *, reach: int = 9, longest: int = 21) -> Tour:
    """What the paper's released code does, for comparison: directed neighbours, no rule for where to start.

    A chain goes on to the first unvisited of the `reach` nearest, and ends at `longest` documents. Shorter chains are
    then dissolved: each of their documents goes in front of its first neighbour in a chain of full length, or, where
    it has none (where the code fails), to the end, as a chain of its own.

    ids_NK: neighbours of each document, -1: none.
    """
    chains, chain_of = _directed_chains(ids_NK, reach, longest)
    full = [len(chain) == longest for chain in chains]
    ahead: dict[int, list[int]] = {}
    alone = []
    for chain, whole in zip(chains, full, strict=True):
        for here in [] if whole else chain:
            near = [j for j in ids_NK[here].tolist() if j >= 0 and full[chain_of[j]]]
            ahead.setdefault(near[0], []).append(here) if near else alone.append(here)
    path: list[int] = []
    jumps: list[int] = []
    for chain, whole in zip(chains, full, strict=True):
        if whole:
            jumps.append(len(path))
            path += [member for here in chain for member in (*ahead.get(here, []), here)]
    jumps += range(len(path), len(path) + len(alone))
    return Tour(np.asarray(path + alone, np.int64), np.asarray(jumps, np.int64))


def _directed_chains(ids_NK: np.ndarray, reach: int, longest: int) -> tuple[list[list[int]], np.ndarray]:
    chain_of = np.full(len(ids_NK), -1, np.int64)
    chains: list[list[int]] = []
    rows = ids_NK[:, :reach].tolist()
    for start in range(len(rows)):
        here = start if chain_of[start] < 0 else -1
        chain: list[int] = []
        while here >= 0 and len(chain) < longest:
            chain.append(here)
            chain_of[here] = len(chains)
            here = next((j for j in rows[here] if j >= 0 and chain_of[j] < 0), -1)
        if chain:
            chains.append(chain)
    return chains, chain_of
