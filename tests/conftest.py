"""Eight CPU devices, strict promotion of ranks, quick compilation and a cache of it; all set before JAX starts."""

import os
import tempfile
from pathlib import Path

CACHE = Path(tempfile.gettempdir()) / f"lmlab-tests-{os.getuid()}"
os.environ["LMLAB_CACHE"] = str(CACHE)
# Programs run for milliseconds here and take seconds to compile: LLVM's optimisations double the time of the suite.
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(CACHE / "xla"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
