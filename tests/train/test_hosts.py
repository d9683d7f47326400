"""Jobs of real processes over loopback: the same run on any number of them, stopped, killed, and gone on with."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_run import RECIPE, rows

from lmlab.core.errors import UserError
from lmlab.train import hosts
from lmlab.train.config import HostsConfig

ROOT = Path(__file__).resolve().parents[2]
DEVICES = 8
STEPS = ("--train.steps", "20", "--eval.no-baselines")
PATIENCE = 120


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A corpus and a recipe whose rows go over two ways of division."""
    folder = tmp_path_factory.mktemp("job")
    recipe = RECIPE.replace("batch_size=4", "batch_size=8").replace("ParallelConfig(data=1)", "ParallelConfig(fsdp=2)")
    (folder / "tiny.py").write_text(recipe.replace("TransformerConfig(", "TransformerConfig(vocab_size=264, "))
    lines = [json.dumps({"text": f"abc {i} " * (i % 5 + 2)}) for i in range(60)]
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


FAULTY = """
import sys, orbax.checkpoint as ocp
from lmlab.cli import main
read = ocp.CompositeCheckpointHandler.restore
def restore(self, folder, args):
    if "params" in args.keys() and folder.name == "20":
        raise OSError("input/output error")
    return read(self, folder, args)
ocp.CompositeCheckpointHandler.restore = restore
sys.exit(main(sys.argv[1:]))
"""
"""lmlab on a host whose disk fails at the arrays of checkpoint 20."""


def start(
    folder: Path, out: str, processes: int, *words: str, faulty: int = -1, **own: list[str]
) -> list[subprocess.Popen[str]]:
    """All processes of a job that has eight devices together.

    faulty: number of the process whose disk fails. own: an option, and its value in each process.
    """
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={DEVICES // processes}",
    }  # fmt: skip
    command = ["run", "tiny.py", "--out", out, *STEPS, *words]
    if processes > 1:
        command += ["--hosts.address", f"127.0.0.1:{free_port()}", "--hosts.count", str(processes)]
    job = []
    for index in range(processes):
        mine = [*command, "--hosts.index", str(index)] if processes > 1 else command
        mine += [word for option, values in own.items() for word in (f"--{option}", values[index])]
        program = [sys.executable, *(["-c", FAULTY] if index == faulty else ["-m", "lmlab.cli"])]
        job.append(subprocess.Popen([*program, *mine], cwd=folder, env=environment, text=True, stdin=subprocess.DEVNULL,
                                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT))  # fmt: skip
    return job


def outputs(job: list[subprocess.Popen[str]]) -> list[str]:
    """What each process has printed; its exit code is then known."""
    try:
        return [process.communicate(timeout=PATIENCE)[0] for process in job]
    finally:
        for process in job:
            process.kill()


def finished(folder: Path, out: str, processes: int, *words: str) -> list[str]:
    """Run a job to its end."""
    job = start(folder, out, processes, *words)
    said = outputs(job)
    assert [process.returncode for process in job] == [0] * processes, said[0][-3000:]
    return said


def measured(folder: Path, out: str) -> tuple[list[dict], str]:
    return rows(folder / out, "train", "eval"), (folder / out / "samples.jsonl").read_text()


@pytest.fixture(scope="module")
def alone(folder) -> tuple[list[dict], str]:
    finished(folder, "alone", 1)
    return measured(folder, "alone")


def wait_for(folder: Path, out: str, job: list[subprocess.Popen[str]], step: int) -> None:
    """Until the job has a checkpoint of this step or a later one."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and all(process.poll() is None for process in job):
        found = [int(path.name) for path in (folder / out / "checkpoints").glob("*") if path.name.isdigit()]
        if max(found, default=0) >= step:
            return
        time.sleep(0.005)


def same(one: tuple[list[dict], str], other: tuple[list[dict], str]) -> None:
    """Rows agree to rounding, samples to the letter."""
    assert [(row["step"], row["kind"]) for row in one[0]] == [(row["step"], row["kind"]) for row in other[0]]
    for mine, theirs in zip(one[0], other[0], strict=True):
        numbers = {name: value for name, value in theirs.items() if isinstance(value, float)}
        assert {name: mine[name] for name in numbers} == pytest.approx(numbers, rel=1e-5, abs=1e-5)
    assert one[1] == other[1]


def test_stopped_on_any_host_and_gone_on_with_on_more(folder, alone):
    job = start(folder, "stopped", 2)
    wait_for(folder, "stopped", job, 4)
    job[1].send_signal(signal.SIGTERM)
    said = outputs(job)
    assert [process.returncode for process in job] == [128 + signal.SIGTERM] * 2, said[0][-3000:]
    assert "stopped by SIGTERM" in said[0]
    again = finished(folder, "stopped", 4)
    assert "resuming at step" in again[0]
    assert "report" in again[0]
    assert all("report" not in other and "loss" not in other for other in again[1:])
    same(measured(folder, "stopped"), alone)


def test_one_process_killed_and_the_job_started_again_on_fewer_devices(folder, alone):
    job = start(folder, "killed", 4)
    wait_for(folder, "killed", job, 6)
    job[2].kill()
    time.sleep(0.2)
    for process in job:
        process.kill()
    outputs(job)
    again = finished(folder, "killed", 1, "--parallel.data", "2", "--parallel.fsdp", "1")
    assert "resuming at step" in again[0]
    same(measured(folder, "killed"), alone)


def test_a_checkpoint_that_one_process_cannot_read(folder, alone):
    finished(folder, "damaged", 2)
    job = start(folder, "damaged", 2, faulty=1)
    said = outputs(job)
    assert [process.returncode for process in job] == [0, 0], said[0][-3000:]
    assert "checkpoint 20 is damaged (another process cannot read it)" in said[0]
    assert "resuming at step 18" in said[0]
    same(measured(folder, "damaged"), alone)


def test_processes_with_different_commands_are_told(folder):
    job = start(folder, "different", 2, **{"train.seed": ["1", "2"]})
    said = outputs(job)
    assert [process.returncode for process in job] == [2, 2], said[0][-2000:]
    assert all("the same in all processes" in text for text in said)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (HostsConfig("somewhere"), "HOST:PORT"),
        (HostsConfig("127.0.0.1:1", count=2, index=2), "0 to hosts.count - 1"),
        (HostsConfig("127.0.0.1:1"), "0 to hosts.count - 1"),
        (HostsConfig("auto"), "a job that all its processes join"),
    ],
)
def test_a_job_that_cannot_be_joined(config, said):
    with pytest.raises(UserError, match=said):
        hosts.join(config)


def test_a_single_process_agrees_with_itself():
    assert hosts.agreement()(15) == 15
    assert hosts.any_process(True)
    hosts.same_everywhere("recipe", "a")
    with pytest.raises(UserError, match="nothing"):
        hosts.first_does(lambda: (_ for _ in ()).throw(UserError("nothing", 0, "something")))
