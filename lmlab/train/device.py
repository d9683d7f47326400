"""What the devices can do at most, where that is published."""

import jax

PEAK_TFLOPS: dict[str, dict[str, float]] = {
    "TPU v4": {"bfloat16": 275},
    "TPU v5 lite": {"bfloat16": 197},
    "TPU v5": {"bfloat16": 459},
    "TPU v5p": {"bfloat16": 459},
    "TPU v6 lite": {"bfloat16": 918},
    "NVIDIA A100": {"bfloat16": 312, "float32": 19.5},
    "NVIDIA H100": {"bfloat16": 989, "float32": 67},
    "NVIDIA H200": {"bfloat16": 989, "float32": 67},
}
"""Dense peak of one device by the beginning of its kind, as its maker publishes it for the SXM or full chip."""


def peak_flops(compute_dtype: str) -> float | None:
    """Peak of all devices of the job together in FLOP/s; None where it is not known."""
    kind = jax.devices()[0].device_kind
    known = [name for name in PEAK_TFLOPS if kind.startswith(name)]
    if not known:
        return None
    peak = PEAK_TFLOPS[max(known, key=len)].get(compute_dtype)
    return peak and peak * 1e12 * jax.device_count()
