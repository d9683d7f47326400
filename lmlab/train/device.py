"""What devices can do at most, as their makers publish it."""

import difflib
from typing import NamedTuple

import jax

from lmlab.core.errors import UserError


class Chip(NamedTuple):
    """One device. Peaks are dense; rates are of the whole chip."""

    kind: str
    """How the `device_kind` of JAX begins."""
    platform: str
    tflops: dict[str, float]
    """10^12 operations a second by compute type."""
    memory: float
    """Bytes of HBM."""
    memory_rate: float
    """Bytes a second from HBM."""
    link_rate: float
    """Bytes a second that a chip sends along one axis of a mesh: TPU: both directions of one dimension of the torus,
    that is the published bidirectional rate / 2 / dimensions; GPU: NVLink, one direction."""
    node: int = 0
    """Devices that these links join; 0: all of them."""
    network_rate: float = 0.0
    """Bytes a second that a device sends beyond its node."""


GIB = 2.0**30
CHIPS: dict[str, Chip] = {
    # docs.cloud.google.com/tpu/docs (v4, v5e, v5p, v6e), read in November 2026. Interconnect both ways together: 600
    # (v4: 2400 Gbps each way), 400, 1200, 800 GB/s, on a torus of 3, 2, 3, 2 dimensions.
    "v4": Chip("TPU v4", "tpu", {"bfloat16": 275}, 32 * GIB, 1228e9, 100e9),
    "v5e": Chip("TPU v5 lite", "tpu", {"bfloat16": 197}, 16 * GIB, 819e9, 100e9),
    "v5p": Chip("TPU v5", "tpu", {"bfloat16": 459}, 95 * GIB, 2765e9, 200e9),
    "v6e": Chip("TPU v6 lite", "tpu", {"bfloat16": 918}, 32 * GIB, 1638e9, 200e9),
    # NVIDIA data sheets of the SXM modules (A100 80GB); NVLink 600, 900, 900 GB/s both ways together, in nodes of 8;
    # beyond them 400 Gb/s InfiniBand for each H100 and H200, 200 for each A100, as in DGX.
    "a100": Chip("NVIDIA A100", "gpu", {"bfloat16": 312, "float32": 19.5}, 80e9, 2039e9, 300e9, 8, 25e9),
    "h100": Chip("NVIDIA H100", "gpu", {"bfloat16": 989, "float32": 67}, 80e9, 3350e9, 450e9, 8, 50e9),
    "h200": Chip("NVIDIA H200", "gpu", {"bfloat16": 989, "float32": 67}, 141e9, 4800e9, 450e9, 8, 50e9),
}


def chip_named(name: str) -> Chip:
    """The chip of this name, in any case. Raises `UserError` with the nearest name."""
    if name.lower() in CHIPS:
        return CHIPS[name.lower()]
    near = difflib.get_close_matches(name.lower(), CHIPS, n=1)
    raise UserError("chip", name, f"one of {', '.join(CHIPS)}", f"Did you mean {near[0]}?" if near else "")


def peak_flops(compute_dtype: str) -> float | None:
    """Peak of all devices of the job together in FLOP/s; None where it is not known."""
    kind = jax.devices()[0].device_kind
    known = [chip for chip in CHIPS.values() if kind.startswith(chip.kind)]
    if not known:
        return None
    peak = max(known, key=lambda chip: len(chip.kind)).tflops.get(compute_dtype)
    return peak and peak * 1e12 * jax.device_count()
