"""Eight CPU devices, strict promotion of ranks, quick compilation and a cache of it; all set before JAX starts."""

import gc
import itertools
import json
import os
import shutil
import tempfile
from pathlib import Path

CACHE = Path(tempfile.gettempdir()) / f"lmlab-tests-{os.getuid()}"
os.environ["LMLAB_CACHE"] = str(CACHE)
FLAGS = (
    "--xla_force_host_platform_device_count=8",
    # Programs run for milliseconds here and take seconds to compile: LLVM's optimisations double the time of the suite,
    # to build every fusion by MLIR doubles the rest. A program in parts for many threads takes longer, and more maps.
    "--xla_backend_optimization_level=0", "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
    # Eight devices on two cores: XLA aborts the process where a thread waits for another longer than 40 seconds, as it
    # may on a machine that others use.
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds=120",
    "--xla_cpu_collective_call_terminate_timeout_seconds=600",
)  # fmt: skip
os.environ["XLA_FLAGS"] = " ".join((os.environ.get("XLA_FLAGS", ""), *FLAGS))
os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402
import pytest  # noqa: E402
from tiny_run import RECIPE, RUN  # noqa: E402

from lmlab.cli import main  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
# A cache for each worker: one has died where it read what another may have been writing.
jax.config.update("jax_compilation_cache_dir", str(CACHE / "xla" / os.environ.get("PYTEST_XDIST_WORKER", "alone")))
# To write and read one operation's program takes as long as to compile it.
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


# Traces leave many objects behind; to look through all of them so often is a tenth of the time of the suite.
gc.set_threshold(100_000, 20, 100)

MAPS, TESTS = 40_000, 20
"""Maps of memory, of which Linux gives a process 65,530 (vm.max_map_count). Each compiled program holds some, and the
process that gets no more dies of a segmentation fault; the tests of one table of models need as many. They are counted
once in so many tests."""
DONE = itertools.count(1)


@pytest.fixture(autouse=True)
def _forget_programs():
    """Drop the compiled programs when a worker has many."""
    yield
    maps = Path("/proc/self/maps")
    if next(DONE) % TESTS == 0 and maps.exists() and maps.read_bytes().count(b"\n") > MAPS:
        jax.clear_caches()


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """A folder with the recipe, its corpus, and in "out" a run that nobody touched."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "tiny.py").write_text(RECIPE)
    lines = [json.dumps({"text": f"abc {i} " * (i % 5 + 2)}) for i in range(60)]
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(RUN) == 0
    return folder


@pytest.fixture
def place(finished, tmp_path, monkeypatch) -> Path:
    """A copy of `finished` to work in."""
    shutil.copytree(finished, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"
