"""What a process sets before it computes: where compiled programs are kept, how memory is reused, what is logged."""

import ctypes
import importlib.util
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
"""Parameters of glibc's mallopt."""


def cache_folder() -> Path:
    """$LMLAB_CACHE, or ~/.cache/lmlab: token caches and compiled programs."""
    return Path(os.environ.get("LMLAB_CACHE") or Path.home() / ".cache" / "lmlab")


def prepare(compile_cache: bool = True) -> None:
    """Call once, before JAX computes or starts a thread. Safe to call again; a compile cache that is set stays."""
    if not accelerated():
        keep_freed_memory()
    import jax

    quieten()
    if compile_cache and jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def quieten() -> None:
    """Keep what libraries say of their insides from the user of a run, who gets one message from lmlab.

    Orbax raises a write that failed (full disk); besides, absl, asyncio and the threads of tensorstore, which call back
    into a loop that is closed by then, print hundreds of lines of traceback about it.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            sys.__unraisablehook__(unraisable)

    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = hook


def accelerated() -> bool:
    """Whether JAX may find an accelerator here. Does not ask JAX, which would start its threads to answer."""
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return False
    return any(importlib.util.find_spec(name) for name in ("jax_cuda12_plugin", "jax_cuda13_plugin", "libtpu"))


def keep_freed_memory() -> None:
    """Let glibc keep large blocks that XLA frees instead of returning them to the kernel.

    XLA on the CPU allocates its temporaries anew at every step, by mmap, and the kernel then clears every page at
    its first touch: about 160,000 page faults and a fifth of the time of a 12M-parameter step. The memory
    in use never shrinks below its peak. Threads that run already keep an allocator of their own, so this comes before
    they start. Does nothing where the C library is another.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(M_ARENA_MAX, 1)
