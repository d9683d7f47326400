"""A tiny recipe and what is read off its runs, for the tests of the whole program."""

import json
from pathlib import Path

RECIPE = """
from lmlab.data.config import DataConfig, Files
from lmlab.inference.config import SamplingConfig
from lmlab.models.config import AttentionConfig, TransformerConfig
from lmlab.recipe import EvalConfig, Pretrain
from lmlab.train.config import ParallelConfig, TrainConfig

def recipe():
    return Pretrain(
        model=TransformerConfig(layers=2, width=16, max_length=32, attention=AttentionConfig(heads=2)),
        data=DataConfig(sources={"text": Files("corpus.jsonl", heldout_percent=20)}, length=16, batch_size=4),
        train=TrainConfig(steps=6, log_every=1, eval_every=3, sample_every=2, checkpoint_every=2),
        parallel=ParallelConfig(data=1),
        eval=EvalConfig(batches=1, prompts=("ab",), sampling=SamplingConfig(max_new_tokens=4)),
    )
"""
RUN = ["run", "tiny.py", "--out", "out"]


def rows(run: Path, *kinds: str) -> list[dict]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if row["kind"] in kinds]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def one_line(capsys) -> str:
    """What was said on standard error: one message, no traceback."""
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if line.startswith("lmlab: ")]
    assert len(lines) == 1, said
    assert "Traceback" not in said
    return lines[0]
