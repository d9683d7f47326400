"""The methods in one run: several of them in their slots train, resume bit for bit, and sample."""

import json
import signal
from pathlib import Path

import chex
import numpy as np
import pytest
from tiny_run import rows

import lmlab.training
from lmlab.cli import main
from lmlab.recipe import load_recipe
from lmlab.runs import load_heads

COMPOSED = str(Path(__file__).resolve().parents[1] / "configs" / "composed.py")
SMALL = """
from dataclasses import replace

from lmlab.data.config import Files
from lmlab.models.config import AttentionConfig, ParameterTokens
from lmlab.recipe import load_recipe


def recipe():
    large = load_recipe({path!r})[1]
    model = replace(large.model, layers=5, width=16, max_length=64, attention=AttentionConfig(heads=2),
                    parameter_tokens=ParameterTokens(qkv=12))
    data = replace(large.data, sources={{"text": Files("corpus.jsonl", heldout_percent=20)}}, length=32, batch_size=4)
    galore = replace(large.optim.galore, rank=4, refresh_every=3)
    train = replace(large.train, steps=6, log_every=1, eval_every=3, sample_every=6, checkpoint_every=2)
    return replace(large, model=model, data=data, optim=replace(large.optim, galore=galore), train=train)
"""
RUN = ["run", "small.py", "--parallel.data", "1", "--out"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A corpus of three topics, and the recipe at toy size."""
    folder = tmp_path_factory.mktemp("composed")
    (folder / "small.py").write_text(SMALL.format(path=COMPOSED))
    texts = [f"topic{i % 3} word{i % 3} {i} " * (i % 4 + 2) for i in range(60)]
    (folder / "corpus.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return folder


def test_all_of_it_trains_resumes_bit_for_bit_and_samples(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert main([*RUN, "whole"]) == 0
    save = lmlab.training.save

    def save_then_stop(*args):
        save(*args)
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(lmlab.training, "save", save_then_stop)
        assert main([*RUN, "parts"]) == 128 + signal.SIGTERM
    assert main([*RUN, "parts"]) == 0
    assert "resuming at step" in capsys.readouterr().out
    for name in ("whole", "parts"):
        assert rows(folder / name, "eval")[-1]["step"] == 6
    assert rows(folder / "parts", "train", "eval") == rows(folder / "whole", "train", "eval")
    assert (folder / "parts/samples.jsonl").read_text() == (folder / "whole/samples.jsonl").read_text()
    chex.assert_trees_all_equal(load_heads(folder / "parts").params, load_heads(folder / "whole").params)
    losses = [row["loss"] for row in rows(folder / "whole", "train")]
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]
    capsys.readouterr()
    assert main(["generate", "whole", "--heads", "4", "--prompt", "topic1", "--max-new-tokens", "8"]) == 0
    assert capsys.readouterr().out.startswith("topic1")


def test_the_recipe_names_every_part():
    recipe = load_recipe(COMPOSED)[1]
    assert type(recipe.model).__name__ == "TokenFormerConfig"
    assert (recipe.heads, recipe.data.order, recipe.optim.parameters) == (4, "in_context", "bfloat16_master")
    assert recipe.optim.galore.rank
