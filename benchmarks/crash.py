"""Kill training at random instants, resume, and compare with a run that nobody touched: `python -m benchmarks.crash`.

Instants are drawn over the whole life of the process, inside the build of the token cache and inside the write of a
checkpoint among them; the signals are SIGKILL, SIGTERM and SIGINT. Then the newest checkpoint of an interrupted run is
truncated, corrupted and stripped of a file: the run has to say so and fall back. Parameters, optimiser state, metrics
and samples must be the same bit for bit. Prints a table, and as its last line one JSON object; exit code 1 if a
difference was found. This file is also the recipe of the runs.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lmlab.data.config import DataConfig, Files, TrainedBPE
from lmlab.inference.config import SamplingConfig
from lmlab.models.config import AttentionConfig, TransformerConfig
from lmlab.recipe import EvalConfig, Pretrain
from lmlab.train.config import TrainConfig

STEPS, KILLS_PER_RUN = 48, 4
MODULES = "argparse.py", "ast.py", "asyncio/*.py", "datetime.py", "doctest.py", "email/*.py", "inspect.py", "typing.py"
PATIENCE = 300.0
"""Seconds after which a process that does not end counts as hanging."""


def recipe() -> Pretrain:
    """Small enough to end in seconds, with a checkpoint every third step so that kills meet writes."""
    return Pretrain(
        model=TransformerConfig(layers=2, width=64, max_length=64, attention=AttentionConfig(heads=4)),
        data=DataConfig(sources={"text": Files("corpus/*.txt", heldout_percent=20)}, tokenizer=TrainedBPE(512),
                        length=32, batch_size=8),
        train=TrainConfig(steps=STEPS, log_every=1, eval_every=16, sample_every=24, checkpoint_every=3),
        eval=EvalConfig(batches=2, prompts=("import ",), baselines=False, sampling=SamplingConfig(max_new_tokens=8)),
    )  # fmt: skip


@dataclass(frozen=True)
class Lab:
    """A folder with the corpus, the token caches and the runs; compiled programs are shared by all."""

    folder: Path

    def start(self, run: str) -> subprocess.Popen[str]:
        """The training process of one run, which has a token cache of its own."""
        command = [sys.executable, "-m", "lmlab.cli", "run", str(Path(__file__).resolve()), "--out", run,
                   "--data.cache-dir", f"{run}-cache"]  # fmt: skip
        root = str(Path(__file__).resolve().parents[1])
        # The path of the compile cache is part of XLA's key, so it has to be the same for all.
        shared = {"LMLAB_CACHE": str(self.folder / "cache"), "JAX_PLATFORMS": "cpu", "PYTHONPATH": root}
        environment = os.environ | shared
        return subprocess.Popen(command, cwd=self.folder, env=environment, text=True, stdin=subprocess.DEVNULL,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip

    def finish(self, run: str) -> tuple[str, float]:
        """Run to the end; what was printed, and the seconds. Raises if the exit code is not 0."""
        began = time.monotonic()
        process = self.start(run)
        output = process.communicate(timeout=PATIENCE)[0]
        if process.returncode != 0:
            raise RuntimeError(f"{run} ended with {process.returncode}:\n{output[-3000:]}")
        return output, time.monotonic() - began

    def kill(self, run: str, number: signal.Signals, moment: Callable[[], bool]) -> bool:
        """Start a run and signal it at the first `moment()`; False if it ended before that."""
        process = self.start(run)
        deadline = time.monotonic() + PATIENCE
        while process.poll() is None and not moment() and time.monotonic() < deadline:
            time.sleep(0.001)
        if process.poll() is None:
            process.send_signal(number)
        output = process.communicate(timeout=PATIENCE)[0]
        if process.returncode not in (0, -number, 128 + number):
            raise RuntimeError(f"{run}, sent {number.name}, ended with {process.returncode}:\n{output[-3000:]}")
        return process.returncode != 0

    def writing_cache(self, run: str) -> bool:
        """Whether a cache is half written at this instant."""
        return any((self.folder / f"{run}-cache").glob("*.partial"))

    def writing_checkpoint(self, run: str) -> bool:
        """Whether a checkpoint is half written at this instant."""
        return any((self.folder / run / "checkpoints").glob("*tmp*"))


def make_lab(folder: Path) -> Lab:
    """A corpus of some modules of the standard library, one document a module."""
    library = Path(sysconfig.get_path("stdlib"))
    (folder / "corpus").mkdir(parents=True)
    for pattern in MODULES:
        for path in sorted(library.glob(pattern)):
            shutil.copyfile(path, folder / "corpus" / f"{path.parent.name}-{path.stem}.txt")
    return Lab(folder)


def moments(lab: Lab, run: str, seconds: float, rng: random.Random) -> dict[str, Callable[[], bool]]:
    """Ways to choose an instant, by name; each starts its clock when made."""
    began = time.monotonic()
    at = began + rng.uniform(0.0, seconds)
    wait = rng.uniform(0.0, 0.03)
    skip = rng.randrange(1, 4)
    seen: set[str] = set()

    def in_write(writing: Callable[[str], bool], names: Callable[[], set[str]], count: int) -> bool:
        if not writing(run):
            return False
        seen.update(names())
        if len(seen) < count:
            return False
        time.sleep(wait)
        return True

    checkpoints = lab.folder / run / "checkpoints"
    return {
        "any instant": lambda: time.monotonic() > at,
        "checkpoint write": lambda: in_write(
            lab.writing_checkpoint, lambda: {path.name.split(".")[0] for path in checkpoints.glob("*tmp*")}, skip
        ),
        "cache write": lambda: in_write(lab.writing_cache, lambda: {"cache"}, 1),
    }


def kill_all(lab: Lab, kills: int, seconds: float, seed: int) -> tuple[Counter[str], list[str]]:
    """Kill runs until `kills` have hit; counts by kind, and what differs from the reference after all."""
    rng, done, differing = random.Random(seed), Counter[str](), []
    number = 0
    while done.total() < kills:
        run = f"killed-{number}"
        number += 1
        # The first kill meets a run without caches; later ones meet one that has checkpoints.
        plan = ["cache write" if number % 2 else "any instant", "any instant", "checkpoint write", "checkpoint write"]
        for kind in plan[: min(KILLS_PER_RUN, kills - done.total())]:
            sent = rng.choices([signal.SIGKILL, signal.SIGTERM, signal.SIGINT], [6, 1, 1])[0]
            if lab.kill(run, sent, moments(lab, run, seconds, rng)[kind]):
                done[f"{kind}, {sent.name}"] += 1
                print(f"kill {done.total():2d}  {run:10s} {sent.name:8s} {kind:18s} {reached(lab, run)}", flush=True)
        lab.finish(run)
        differing += [f"{run}: {what}" for what in differences(lab, "reference", run)]
    return done, differing


def reached(lab: Lab, run: str) -> str:
    """Where a run was when it was killed."""
    steps = [int(path.name) for path in (lab.folder / run / "checkpoints").glob("*") if path.name.isdigit()]
    half = "  half a checkpoint left" if lab.writing_checkpoint(run) else ""
    return f"checkpoints {sorted(steps)}" + half + ("  half a cache left" if lab.writing_cache(run) else "")


def differences(lab: Lab, one: str, two: str) -> list[str]:
    """What is not the same in two finished runs: arrays by path, rows of metrics, samples."""
    found = [name for name, same in same_arrays(lab.folder / one, lab.folder / two).items() if not same]
    for name in ("metrics.jsonl", "samples.jsonl"):
        # Rows of kind speed tell of the clock.
        rows = [
            [
                row
                for row in map(json.loads, (lab.folder / run / name).read_text().splitlines())
                if row.get("kind") != "speed"
            ]
            for run in (one, two)
        ]
        found += [] if rows[0] == rows[1] and rows[0] else [name]
    return found


def same_arrays(one: Path, two: Path) -> dict[str, bool]:
    """By path, whether each array of the last checkpoints (parameters, optimiser state, step, key) is the same."""
    import jax
    import numpy as np

    from lmlab.optim.groups import path_name

    states = [jax.tree_util.tree_leaves_with_path(final_state(folder)) for folder in (one, two)]
    raw = lambda leaf: jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    return {
        path_name(path): np.asarray(raw(a)).tobytes() == np.asarray(raw(b)).tobytes()
        for (path, a), (_, b) in zip(*states, strict=True)
    }


def final_state(folder: Path):
    """The whole state in the newest checkpoint, which must be the one of the last step."""
    import jax

    from lmlab.models.transformer import transformer
    from lmlab.optim.chain import build_optimizer
    from lmlab.train.checkpoint import finish, restore
    from lmlab.train.folder import read_config
    from lmlab.train.state import init_state
    from lmlab.training import load_checkpoints

    config = read_config(folder)
    lm = transformer(config.model)
    checkpoints = load_checkpoints(folder)
    state = restore(checkpoints, init_state(lm.init, build_optimizer(config.optim, lm.axes, STEPS), config.train.seed))
    finish(checkpoints)
    if state is None or int(state.step) != STEPS:
        raise RuntimeError(f"{folder} has no checkpoint of step {STEPS}")
    return jax.block_until_ready(state)


def largest_file(folder: Path) -> Path:
    """The file that holds most of the arrays."""
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def truncate(step: Path) -> None:
    """Cut the largest file in half."""
    path = largest_file(step)
    os.truncate(path, path.stat().st_size // 2)


def corrupt(step: Path) -> None:
    """Flip one bit in the middle of the largest file."""
    path = largest_file(step)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def strip(step: Path) -> None:
    """Remove the largest file."""
    largest_file(step).unlink()


def damage_all(lab: Lab) -> tuple[dict[str, str], list[str]]:
    """Damage the newest checkpoint of an interrupted run in each way; the line it said, and what differs after."""
    last = lab.folder / "interrupted" / "checkpoints"
    enough = lambda: sum(path.name.isdigit() for path in last.glob("*")) >= 2
    lab.kill("interrupted", signal.SIGTERM, enough)
    said, differing = {}, []
    for damage in (truncate, corrupt, strip):
        run = f"damage-{damage.__name__}"
        shutil.copytree(lab.folder / "interrupted", lab.folder / run)
        # The config holds the name of the cache, which is no part of what is tested.
        config = lab.folder / run / "config.json"
        config.write_text(config.read_text().replace("interrupted-cache", f"{run}-cache"))
        steps = [path for path in (lab.folder / run / "checkpoints").glob("*") if path.name.isdigit()]
        damage(max(steps, key=lambda path: int(path.name)))
        output, _ = lab.finish(run)
        said[damage.__name__] = next((line for line in output.splitlines() if "is damaged" in line), "")
        print(f"{damage.__name__:9s} {said[damage.__name__] or 'NOTHING WAS SAID'}", flush=True)
        differing += [f"{run}: {what}" for what in differences(lab, "reference", run)]
    return said, differing


def main(argv: list[str] | None = None) -> int:
    """Run everything; 0 if all runs are identical and every damage was told."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="lmlab-crash-") as folder:
        lab = make_lab(Path(folder) / "lab")
        lab.finish("reference")
        # Now that everything is compiled: how long a whole run lasts, and that two runs are alike at all.
        _, seconds = lab.finish("again")
        differing = [f"again: {what}" for what in differences(lab, "reference", "again")]
        print(f"an uninterrupted run of {STEPS} steps takes {seconds:.1f} s", flush=True)
        done, killed_differ = kill_all(lab, args.kills, seconds, args.seed)
        said, damaged_differ = damage_all(lab)
    differing += killed_differ + damaged_differ
    print("\n".join(differing) or "all runs end in the same parameters, optimiser state, metrics and samples")
    identical = not differing
    told = all(said.values())
    print(json.dumps({"kills": done.total(), "by_kind": dict(sorted(done.items())), "identical": identical,
                      "damage_told": told, "seed": args.seed}))  # fmt: skip
    return 0 if identical and told else 1


if __name__ == "__main__":
    sys.exit(main())
