"""What README shows runs, and the recipes load."""

import re
from pathlib import Path

import pytest

from lmlab.cli import COMMANDS
from lmlab.recipe import Pretrain, load_recipe

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_the_python_example_runs_as_it_stands(capsys):
    (program,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    exec(compile(program, "README.md", "exec"), {})
    losses = [float(line) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 3
    assert all(4 < loss < 8 for loss in losses)


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
