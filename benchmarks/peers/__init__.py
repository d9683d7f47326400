"""The train step written as other programs write it: the arms that lmlab's own step is timed against.

Every arm trains the sizes below on the same (8, 257) integer tokens, in float32, with AdamW at these
settings, and answers `make_step(seed) -> step`, where `step(tokens_BT) -> loss` runs one whole
optimisation step and returns only when the new weights are ready. Arms import nothing of lmlab but its
error class, so that a change to the library can never change what it is compared with. `torch_cuda` is the peer of
`benchmarks.gpu` and takes its sizes as a `Shape`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Step = Callable[[np.ndarray], float]  # tokens_BT, int32 (8, 257) -> the loss before the update

N_LAYERS = 6
WIDTH = 384
N_HEADS = 6
HEAD_SIZE = 64
FFN = 1024
VOCAB = 4096
BATCH = 8
SEQ_LEN = 256
NORM_EPS = 1e-5
ROPE_BASE = 10_000.0

# Constant, so that no arm pays for a schedule. The decay falls on every weight, norms included: that is
# what both torch.optim.AdamW and optax.adamw do when nobody passes them groups or a mask.
LEARNING_RATE = 3e-4
BETA_1 = 0.9
BETA_2 = 0.999
ADAM_EPS = 1e-8
WEIGHT_DECAY = 0.01


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama with tied embeddings and as many key heads as query heads."""

    layers: int
    width: int
    heads: int
    ffn: int
    vocab: int
