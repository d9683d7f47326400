"""Two orders of the rows of rotary queries and keys."""

import numpy as np


def adjacent_rows(rows: slice, head_dim: int) -> np.ndarray:
    """Where a matrix that rotates neighbours (llama.cpp, llama2.c) holds `rows` of one that rotates halves.

    transformers turns row i of a head together with row i + head_dim / 2, the others row 2i with row 2i + 1.
    """
    wanted = np.arange(rows.start, rows.stop, rows.step)
    within = wanted % head_dim
    return wanted - within + 2 * (within % (head_dim // 2)) + within // (head_dim // 2)
