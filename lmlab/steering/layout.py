"""Where the particles of every round stand in a tree of columns whose lines do not cross."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lmlab.steering.rounds import Round

MOST_ROWS, MOST_COLUMNS = 64, 128
"""What is drawn of larger runs: the heaviest particles with their ancestors, and the first rounds."""


@dataclass(frozen=True)
class Node:
    """A particle after a round."""

    particle: int
    row: float
    """From the top, in heights of a row."""
    parent: int
    """Which node of the column before; -1: the prompt."""
    state: str
    """going, ended (finished in this round), over (finished before), dead (in this round)."""


def columns(rounds: Sequence[Round]) -> list[list[Node]]:
    """Nodes of the rounds that are drawn, each column from top to bottom. Who died before is not drawn again."""
    drawn = rounds[:MOST_COLUMNS]
    kept = _kept(drawn)
    found: list[list[Node]] = []
    for t, one in enumerate(drawn):
        place = {node.particle: i for i, node in enumerate(found[-1])} if found else {}
        # By parent, then by child: lines between columns do not cross.
        order = sorted(kept[t], key=lambda p: (place.get(int(one.parent_P[p]), -1), int(one.child_P[p])))
        middle = (min(len(one.share_P), MOST_ROWS) - 1) / 2
        parents = [place.get(int(one.parent_P[p]), -1) for p in order]
        goals = [middle if parent < 0 else found[-1][parent].row for parent in parents]
        rows = spread(goals, parents, min(len(one.share_P), MOST_ROWS))
        before = rounds[t - 1] if t else None
        placed = zip(order, rows, parents, strict=True)
        found.append([Node(p, row, parent, _state(one, before, p)) for p, row, parent in placed])
    return found


def spread(goals: Sequence[float], groups: Sequence[int], rows: int) -> list[float]:
    """Places 1 apart or more, in order, within [0, rows - 1], near to their goals; a group has one goal, its middle.

    The nearest in the sum of squares (pool adjacent violators); those of a group begin side by side.
    """
    sizes = {group: list(groups).count(group) for group in set(groups)}
    seen = dict.fromkeys(sizes, 0)
    pools: list[list[float]] = []
    for i, (goal, group) in enumerate(zip(goals, groups, strict=True)):
        pools.append([goal + seen[group] - (sizes[group] - 1) / 2 - i, 1])
        seen[group] += 1
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            mean, count = pools.pop()
            last = pools[-1]
            last[0], last[1] = (last[0] * last[1] + mean * count) / (last[1] + count), last[1] + count
    flat = [mean for mean, count in pools for _ in range(int(count))]
    return [min(max(mean, 0.0), float(rows - len(goals))) + i for i, mean in enumerate(flat)]


def _kept(rounds: Sequence[Round]) -> list[set[int]]:
    """Particles of each round that are drawn: ancestors of those of the next, then the heaviest until it is enough."""
    kept: list[set[int]] = []
    needed: set[int] = set()
    for t in range(len(rounds) - 1, -1, -1):
        one, before = rounds[t], rounds[t - 1] if t else None
        chosen = set(needed)
        for p in np.argsort(-one.share_P, kind="stable").tolist():
            if len(chosen) >= MOST_ROWS:
                break
            if one.log_weight_P[p] > -np.inf or _newly_dead(one, before, p):
                chosen.add(p)
        kept.append(chosen)
        needed = {int(one.parent_P[p]) for p in chosen}
    return kept[::-1]


def _newly_dead(one: Round, before: Round | None, p: int) -> bool:
    parent = int(one.parent_P[p])
    moved = before is None or (before.log_weight_P[parent] > -np.inf and not before.finished_P[parent])
    return one.log_weight_P[p] == -np.inf and moved


def _state(one: Round, before: Round | None, p: int) -> str:
    if one.log_weight_P[p] == -np.inf:
        return "dead"
    if not one.finished_P[p]:
        return "going"
    return "over" if before is not None and before.finished_P[int(one.parent_P[p])] else "ended"
