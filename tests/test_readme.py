"""What README shows runs, and the recipes load."""

import re
from functools import partial
from pathlib import Path

import jax
import pytest

from lmlab.cli import COMMANDS
from lmlab.data.tokenizers import byte_tokenizer
from lmlab.inference.config import SamplingConfig
from lmlab.interop.huggingface import save_pretrained
from lmlab.interop.tokenizer_files import TokenizerFiles
from lmlab.models.transformer import transformer
from lmlab.recipe import Pretrain, load_recipe
from lmlab.testing.tiny import tiny_config

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_python_examples_run_as_they_stand(capsys):
    one_device, mesh = EXAMPLES[:2]
    names: dict[str, object] = {}
    exec(compile(one_device, "README.md", "exec"), names)
    losses = [float(line) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 3
    assert all(4 < loss < 8 for loss in losses)
    exec(compile(mesh, "README.md", "exec"), names)
    assert 4 < float(names["metrics"]["loss"]) < 8
    assert dict(names["mesh"].shape) == {"data": 4, "fsdp": 2, "context": 1, "tensor": 1}
    names["SamplingConfig"] = partial(SamplingConfig, max_new_tokens=6)
    exec(compile(next(text for text in EXAMPLES if "multi_token_lm" in text), "README.md", "exec"), names)
    assert 3 <= names["drawn"].passes <= 6
    exec(compile(next(text for text in EXAMPLES if "random_preferences" in text), "README.md", "exec"), names)
    accuracy, margin = (float(value) for value in capsys.readouterr().out.split()[-2:])
    assert (accuracy, margin) == (0.5, 0)
    exec(compile(next(text for text in EXAMPLES if "def alternate" in text), "README.md", "exec"), names)
    tokens_PS = names["particles"].state.tokens_PS
    assert {int(token) % 2 for token in tokens_PS[:, 0]} == {1}


def test_the_example_of_a_real_model_runs_on_a_tiny_one(tmp_path, monkeypatch, capsys):
    config = tiny_config(vocab_size=257, max_length=512)
    text = TokenizerFiles(byte_tokenizer(), None, None)
    params = transformer(config).init(jax.random.key(0))
    save_pretrained(tmp_path / "SmolLM2-135M-Instruct", config, params, text)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"jax": jax}
    exec(compile(EXAMPLES[2], "README.md", "exec"), names)
    assert len(names["texts"]) == 8
    assert float(capsys.readouterr().out) < 0


def test_commands_links_and_files_are_there(monkeypatch):
    named = set(re.findall(r"^lmlab ([\w-]+)", README, flags=re.MULTILINE))
    assert named <= set(COMMANDS)
    paths = set(re.findall(r"\]\(([^):]+)\)", README)) | set(re.findall(r"`((?:lmlab|configs|tests)/[\w./]+)`", README))
    assert [path for path in paths if not (ROOT / path).exists()] == []
    scripts = re.findall(r"python -m ([\w.]+)", README)
    assert [name for name in scripts if not (ROOT / (name.replace(".", "/") + ".py")).exists()] == []


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.stem)
def test_every_recipe_loads(path):
    name, recipe = load_recipe(str(path))
    assert name == path.stem
    assert isinstance(recipe, Pretrain)
