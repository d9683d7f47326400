"""What README shows runs, and the recipes load."""

import re
from pathlib import Path

import pytest

from lmlab.cli import COMMANDS
from lmlab.recipe import Pretrain, load_recipe

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_the_python_examples_run_as_they_stand(capsys):
    one_device, mesh = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(one_device, "README.md", "exec"), names)
    losses = [float(line) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 3
    assert all(4 < loss < 8 for loss in losses)
    exec(compile(mesh, "README.md", "exec"), names)
    assert 4 < float(names["metrics"]["loss"]) < 8
    assert dict(names["mesh"].shape) == {"data": 4, "fsdp": 2, "context": 1, "tensor": 1}


def test_commands_links_and_files_are_there(monkeypatch):
    named = set(re.findall(r"^lmlab (\w+)", README, flags=re.MULTILINE))
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
