"""The scripts of TPU_SETUP.md played against a stand-in for gcloud and for the host that it reaches."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

PAGE = (Path(__file__).resolve().parents[1] / "TPU_SETUP.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)

CLOUD = """#!/bin/bash
echo "$1 $2 $3 $4" >> "$LOG"
case "$*" in
  *" describe "*) head -n 1 "$STATES"; test "$(wc -l < "$STATES")" = 1 || sed -i 1d "$STATES" ;;
  *" scp "*) cp "$5" "$VM" ;;
  *" ssh "*) cd "$VM" && HOME=$VM bash -c "${!##--command=}" ;;
esac
"""
"""Stands for gcloud and one host: the folder $VM is its home."""
UV = """#!/bin/bash
[ "$1" = venv ] && mkdir -p .venv/bin && cp ~/lmlab-stub .venv/bin/lmlab
exit 0
"""
LMLAB = """#!/bin/bash
printf '%s\\n' "$*" >> ~/runs.txt
code=$(head -n 1 ~/codes)
sed -i 1d ~/codes
exit $code
"""
"""Stands for lmlab: ends with the next code of a list."""


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


class Pod(NamedTuple):
    """The file pod.sh, and a cloud to play it on."""

    folder: Path
    environment: dict[str, str]

    def play(self, script: str, codes: list[int], states: list[str] | None = None) -> list[str]:
        """Source the file and run a script; the command lines with which lmlab was started."""
        (self.folder / "vm/codes").write_text("".join(f"{code}\n" for code in codes))
        (self.folder / "states").write_text("".join(f"{state}\n" for state in states or ["ACTIVE"]))
        program = ["bash", "-c", f". ./pod.sh; {script}"]
        subprocess.run(
            program, cwd=self.folder, env=self.environment, check=True, timeout=60, stdout=subprocess.DEVNULL
        )
        runs = self.folder / "vm/runs.txt"
        return runs.read_text().splitlines() if runs.exists() else []

    def calls(self) -> list[str]:
        """What gcloud was asked to do, in order."""
        return [line.split()[3] for line in (self.folder / "log").read_text().splitlines()]


@pytest.fixture
def pod(tmp_path) -> Pod:
    end = BLOCKS.index(next(block for block in BLOCKS if block.startswith("keep() {"))) + 1
    start = BLOCKS.index(next(block for block in BLOCKS if block.startswith("TPU=")))
    (tmp_path / "pod.sh").write_text("".join(BLOCKS[start:end]).replace("/mnt/lmlab", str(tmp_path / "mnt")))
    for name in ("a", "b"):
        put(tmp_path / f"mnt/corpus/{name}.jsonl.gz", "")
    put(tmp_path / "bin/gcloud", CLOUD)
    put(tmp_path / "bin/sleep", f"#!/bin/bash\nexec {shutil.which('sleep')} $(($1 / 60 * 4))e-1\n")
    for name in ("sudo", "gcsfuse", "mountpoint", "curl"):
        put(tmp_path / "bin" / name, "#!/bin/bash\n")
    put(tmp_path / "vm/.local/bin/uv", UV)
    put(tmp_path / "vm/lmlab-stub", LMLAB)
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "pod.sh"], [*who, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    places = {"TMPDIR": ".", "VM": "vm", "LOG": "log", "STATES": "states"}
    paths = {name: str(tmp_path / place) for name, place in places.items()}
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    return Pod(tmp_path, {**os.environ, **paths, "PATH": path})


def test_keep_asks_for_hosts_until_the_run_has_ended(pod):
    states = ["", "WAITING_FOR_RESOURCES", "SUSPENDED", "PROVISIONING", "ACTIVE"]
    runs = pod.play("keep", [143, 1, 0], states)
    assert len(runs) == 3
    assert set(runs) == {runs[0]}
    assert "--hosts.address auto" in runs[0]
    assert f"--data.sources.text.train {pod.folder}/mnt/corpus/*.jsonl.gz --model" in runs[0]
    calls = [call for call in pod.calls() if call not in ("describe", "ssh")]
    assert calls == ["create", "delete", "create", "scp"]
    assert (pod.folder / "vm/lmlab/pod.sh").is_file()


def test_what_cannot_be_used_is_not_tried_again(pod):
    assert len(pod.play("keep", [2, 0])) == 1


def test_hosts_at_work_are_left_alone(pod):
    hold = 'exec 8> "$VM/lmlab.lock"; flock -n 8;'
    assert pod.play(f"set_up; {hold} start; sleep 60; on_all '! flock -n ~/lmlab.lock true'", [0]) == []
    assert len(pod.play("keep", [0])) == 1
