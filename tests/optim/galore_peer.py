"""The same few steps by the authors' code (`galore-torch` 1.0) and by lmlab: cases and gradients of the parity tests.

Run as a script, with torch, transformers and galore-torch, it writes goldens/galore_torch.json.
"""

import importlib
import importlib.util
import json
import sys
import types
from pathlib import Path

import numpy as np

GOLDENS = Path(__file__).parent / "goldens" / "galore_torch.json"
STEPS, RANK, SCALE, RATE = 7, 2, 0.25, 0.01
EPS = 1e-3
"""Large, so that coordinates that are zero but for rounding (two-sided, first step) have steps that are, too."""
SIDES = {"std": "std", "reverse_std": "reverse_std", "left": "right", "right": "left", "full": "two_sided"}
"""Our name of each of theirs: their weights [out, in] are our kernels [in, out], transposed."""
SHAPES = ((6, 10), (10, 6), (8, 8))
CASES = [(side, shape) for side in SIDES for shape in SHAPES]


def gradients(shape):
    """Float32 [STEPS, out, in]."""
    return np.random.default_rng(sum(shape)).normal(size=(STEPS, *shape)).astype(np.float32)


def their_optimizer():
    """Their AdamW. The package itself is not imported: it asks for bitsandbytes, and that for a GPU."""
    if "galore_torch" not in sys.modules:
        package = types.ModuleType("galore_torch")
        package.__path__ = list(importlib.util.find_spec("galore_torch").submodule_search_locations)
        sys.modules["galore_torch"] = package
    return importlib.import_module("galore_torch.adamw").AdamW


def their_weights(side, shape):
    """Float32 [out, in] after all steps from zero. The subspace is found once: signs of the SVD do not matter."""
    import torch

    weights = torch.nn.Parameter(torch.zeros(shape))
    group = {"params": [weights], "rank": RANK, "update_proj_gap": 1000, "scale": SCALE, "proj_type": side}
    optimizer = their_optimizer()([group], lr=RATE, eps=EPS, no_deprecation_warning=True)
    for gradient in gradients(shape):
        weights.grad = torch.from_numpy(gradient)
        optimizer.step()
    return weights.detach().numpy()


if __name__ == "__main__":
    rows = {f"{side} {shape}": their_weights(side, shape).round(8).tolist() for side, shape in CASES}
    GOLDENS.write_text(json.dumps(rows) + "\n")
    print(len(rows), "cases")
