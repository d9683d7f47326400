"""What TPU_SETUP.md shows runs on eight fake devices, or, where it needs a cloud, parses; its arithmetic is right."""

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import pytest

from lmlab import cli
from lmlab.core.sharding import MESH_AXES
from lmlab.models.config import AttentionConfig, MLPConfig, TransformerConfig
from lmlab.models.transformer import transformer
from lmlab.train.parallel import placements

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "TPU_SETUP.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)

SHELL = set(
    shlex.split(
        ". [ break case cd command curl done echo esac exit export fi flock gcsfuse git mountpoint pkill rm scontrol "
        "set sh sleep sudo tail tensorboard test touch trap uv"
    )
)
"""Programs of which only the syntax is checked."""
KEYWORDS = {"until", "while", "do", "then", "if", "else", "!", "{", "}"}
QUEUED, VM = "compute tpus queued-resources", "compute tpus tpu-vm"
GCLOUD = {
    f"{QUEUED} create": {"--node-id", "--zone", "--accelerator-type", "--runtime-version", "--spot"},
    f"{QUEUED} describe": {"--zone", "--format"},
    f"{QUEUED} delete": {"--zone", "--force", "--quiet"},
    f"{VM} ssh": {"--zone", "--worker", "--command"},
    f"{VM} scp": {"--zone", "--worker"},
    "storage buckets create": {"--location", "--uniform-bucket-level-access", "--enable-hierarchical-namespace"},
}
"""Options as the reference of gcloud has them (read in November 2026)."""


class Command(NamedTuple):
    """A simple command, and whether it stands inside of one that takes it to other machines."""

    words: list[str]
    remote: bool


def commands(script: str, remote: bool = False) -> Iterator[Command]:
    """The simple commands of a script, those inside of strings that are run elsewhere included."""
    script = re.sub(r"(^|\s)#[^\n']*$", "", script, flags=re.MULTILINE).replace("\\\n", " ")
    script = re.sub(r"\$\((\w+)\)", r"$\1", script)
    # Heads of functions and of the branches of a case are no commands.
    script = re.sub(r"^ *(\w+\(\) \{|('{2}|[A-Z]+)( \| [A-Z]+)*\))", "", script, flags=re.MULTILINE)
    lexer = shlex.shlex(script, posix=True, punctuation_chars="();<>|&\n")
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t", True, ""
    words: list[str] = []
    drop = False
    for token in [*lexer, ";"]:
        if drop:
            drop = False
        elif set(token) <= set("();|&\n") and token:
            if words:
                yield from nested(words, remote)
            words = []
        elif set(token) <= set("<>&") and token:
            drop = True
            words = words[:-1] if words and words[-1].isdigit() else words
        else:
            words.append(token)


def nested(words: list[str], remote: bool) -> Iterator[Command]:
    """One command without keywords and assignments before it, then those in its arguments."""
    while words and (words[0] in KEYWORDS or re.fullmatch(r"\w+=.*", words[0], flags=re.DOTALL)):
        value = words[0].partition("=")[2]
        if value.startswith("lmlab "):
            yield from commands(value, remote=True)
        words = words[1:]
    if not words:
        return
    if words[0] == "on_all":
        yield from commands(words[1].replace("\\$", "$"), remote=True)
    elif words[0] == "srun":
        rest = [word for word in words[1:] if not word.startswith("-")]
        yield from nested(words[words.index(rest[0]) :], remote=True)
    else:
        yield Command(words, remote)
        for word in words:
            if word.startswith("--command=") and word != "--command=$1":
                yield from commands(word.removeprefix("--command="), remote=True)


def program(command: Command) -> str:
    return command.words[0].rpartition("/")[2]


FUNCTIONS = set(re.findall(r"^(\w+)\(\) \{", PAGE, flags=re.MULTILINE))
ALL = [command for block in BLOCKS for command in commands(block)]
OURS = [command for command in ALL if program(command) == "lmlab"]


def label(command: Command) -> str:
    return " ".join(command.words)[:60]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[0][:40])
def test_every_block_is_a_script(block):
    for script in [block, *re.findall(r"(?:on_all|--command=) ?'([^']*)'", block)]:
        done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_every_command_falls_under_a_rule():
    known = SHELL | FUNCTIONS | {"lmlab", "make", "gcloud", "$RUN"}
    assert [command.words for command in ALL if program(command) not in known] == []
    assert known - FUNCTIONS - {program(command) for command in ALL} == set()
    assert len(OURS) >= 10
    assert any(command.remote for command in OURS)


def test_gcloud_knows_its_options():
    for words in [command.words[1:] for command in ALL if program(command) == "gcloud"]:
        (verb,) = [verb for verb in GCLOUD if words[: len(verb.split())] == verb.split()]
        assert {word.partition("=")[0] for word in words if word.startswith("--")} <= GCLOUD[verb], words


def test_make_has_its_targets():
    found = [command.words for command in ALL if program(command) == "make"]
    assert found
    for words in found:
        subprocess.run([words[0], "-n", *words[1:]], cwd=ROOT, capture_output=True, check=True)


@pytest.mark.parametrize("command", OURS, ids=label)
def test_lmlab_accepts_every_command(command, monkeypatch):
    words = command.words[1:]
    monkeypatch.chdir(ROOT)
    seen = []
    for name, (kind, _) in cli.COMMANDS.items():
        monkeypatch.setitem(cli.COMMANDS, name, (kind, lambda args: seen.append(args) or 0))
    assert cli.main(words) == 0
    for config in [args.config for args in seen if isinstance(args, cli.Run)]:
        assert config.data.batch_size % (max(config.parallel.data, 1) * config.parallel.fsdp) == 0


SMALL = """
from dataclasses import replace
from lmlab.data.config import Bytes, Files
from lmlab.models.config import AttentionConfig, MLPConfig
from lmlab.recipe import load_recipe

def recipe():
    whole = load_recipe({path!r})[1]
    model = replace(whole.model, layers=1, width=32, vocab_size=264, attention=AttentionConfig(heads=4, kv_heads=4),
                    mlp=MLPConfig(width=64))
    data = replace(whole.data, sources={{"text": Files("corpus.txt")}}, tokenizer=Bytes(), length=32, batch_size=8)
    train = replace(whole.train, steps=16, log_every=1, eval_every=16, sample_every=0, checkpoint_every=8)
    eval = replace(whole.eval, batches=1, baselines=False)
    return replace(whole, model=model, data=data, train=train, eval=eval)
"""
"""A recipe with everything of the one on the page but its size."""


def test_what_needs_no_cloud_runs_on_fake_devices(tmp_path, monkeypatch, capsys):
    """In order and in one folder, so that one command may go on with the run of another."""
    assert jax.device_count() == 8
    (tmp_path / "configs").mkdir()
    for path in (ROOT / "configs").glob("*.py"):
        (tmp_path / "configs" / path.name).write_text(SMALL.format(path=str(path)))
    (tmp_path / "corpus.txt").write_text("".join(f"line {i}\n" for i in range(4000)))
    monkeypatch.chdir(tmp_path)
    ran = []
    for command in OURS:
        words = command.words[1:]
        # The compiler that a plan asks is the TPU's, which is not installed everywhere.
        if command.remote or "--hosts.address" in words or words[0] == "plan":
            continue
        assert cli.main(words) == 0, f"{words}: {capsys.readouterr().err}"
        ran.append(words[0])
    assert {"run", "doctor", "report"} <= set(ran)
    assert (tmp_path / "runs/profiled/profile/operations.txt").is_file()


SHAPES = {"1B": (16, 2048, 8192, 16), "8B": (32, 4096, 14336, 32), "70B": (80, 8192, 28672, 64)}
"""Layers, width, feed-forward width, query heads; 8 kv heads of 128, and the vocabulary of Llama 3."""
VOCABULARY, KV_HEADS, HEAD = 128_256, 8, 128
HBM = {"v5e": 16, "v6e": 32, "v5p": 95, "H100": 60}
MEMORY = re.findall(r"^\| (\d+B) \| (\d+) (\w+) \| (.*) \|$", PAGE, flags=re.MULTILINE)


def test_every_model_has_a_mesh_on_every_chip():
    assert {(model, chip) for model, _, chip, _ in MEMORY} == {(model, chip) for model in SHAPES for chip in HBM}
    rows = re.findall(r"^\| (v\w+) \|.*\| (\d+) GB \|", PAGE, flags=re.MULTILINE)
    assert {chip: int(size) for chip, size in rows} | {"H100": 0.75 * 80} == HBM | {"v4": 32}


@pytest.mark.parametrize("row", MEMORY, ids=lambda row: f"{row[0]}-{row[2]}")
def test_the_table_of_memory_is_right_and_its_meshes_divide_the_models(row):
    model, devices, chip, rest = row
    layers, width, ffn, heads = SHAPES[model]
    cells = rest.split(" | ")
    (fsdp, tensor), (rows, length) = ([int(n) for n in cells[i].split(" x ")] for i in (0, 2))
    config = TransformerConfig(
        vocab_size=VOCABULARY, layers=layers, width=width, max_length=length, tied=model == "1B",
        attention=AttentionConfig(heads=heads, kv_heads=KV_HEADS, head_dim=HEAD), mlp=MLPConfig(width=ffn),
    )  # fmt: skip
    lm = transformer(config)
    params = jax.eval_shape(lm.init, jax.random.key(0))
    mesh = jax.sharding.AbstractMesh((1, fsdp, 1, tensor), MESH_AXES)
    assert fsdp * tensor == int(devices)
    assert placements(lm.axes, params, mesh)
    state = 16 * sum(leaf.size for leaf in jax.tree.leaves(params)) / (fsdp * tensor)
    kept = {"full": width, "dots": 3 * width + (heads * HEAD + 2 * KV_HEADS * HEAD + 2 * ffn) / tensor}[cells[1]]
    kept *= 2 * layers * rows * length
    table = 6 * VOCABULARY * width / tensor
    parts = [state, kept, table, state + kept + table]
    assert [f"{part / 1e9:.1f}" for part in parts] == cells[3:7]
    assert int(cells[7]) == HBM[chip]
    assert sum(parts[:3]) < 0.8e9 * HBM[chip]
