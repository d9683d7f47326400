"""The rules of the tree, read off its syntax: who imports whom, what is documented, how long things are."""

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ALLOWED = {
    "core": set(),
    "models": {"core"},
    "objectives": {"core", "models.lm"},
    "optim": {"core"},
    "data": {"core", "retrieval"},
    "retrieval": {"core"},
    "inference": {"core", "models.lm"},
    "train": {"core", "optim"},
    "evals": {"core", "models.lm", "inference", "train"},
    "report": {"core"},
    "interop": {"core", "models", "data", "inference.config"},
}
"""What the modules of a package may import of lmlab besides their own package; all may read the version."""
FREE = {
    "adapters", "cli", "commands", "distillation", "doctor", "evaluation", "finetune", "growing", "label_noise",
    "loading", "multi_token", "ordering", "plan", "policy", "preference", "pretrain", "recipe", "reference", "runs",
    "steering", "talk", "training",
}  # fmt: skip
"""Modules that put the parts together, and import any of them; nothing but `testing` and they import them."""
LIGHT = re.compile(r"^lmlab(\.cli|\.commands|\.recipe|\.core\.errors|\.core\.serialize|(\.\w+)*\.config)$")
"""Modules that the command line loads to print its help."""
HEAVY = {"jax", "jaxlib", "flax", "optax", "orbax", "grain", "tensorflow_datasets", "matplotlib", "numpy"}
FILE_LINES, FUNCTION_LINES = 300, 50
PRIVATE_PATH = re.compile(r"(?<![\w.~}>)-])/(?:work|home|root|Users)/[\w.]")

Functions = ast.FunctionDef | ast.AsyncFunctionDef


def read_tree():
    """Syntax of each module of lmlab by dotted name."""
    found = {}
    for path in sorted((ROOT / "lmlab").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text())
    return found


TREE = read_tree()


def imports(tree, known, top_level=False):
    """Dotted names that a module imports: whole modules where `known` has them, else the module asked."""
    nodes = list(ast.walk(tree))
    if top_level:
        inside = {id(node) for f in nodes if isinstance(f, Functions) for node in ast.walk(f)}
        nodes = [node for node in nodes if id(node) not in inside]
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            full = {alias.name: f"{module}.{alias.name}" for alias in node.names}
            names |= {whole if whole in known else module for whole in full.values()}
    return names


def wrong_arrows(name, tree, known):
    """Imports of lmlab that the table does not allow, and relative ones, which it cannot read."""
    names = imports(tree, known)
    wrong = [f"{name}: relative import {other}" for other in names if other.startswith(".")]
    package = name.split(".")[1] if "." in name else ""
    if package in FREE:
        return wrong
    for other in names:
        if not other.startswith("lmlab."):
            continue
        target = other.removeprefix("lmlab.")
        own = package == target.split(".")[0]
        fine = package == "testing" and target.split(".")[0] != "cli"
        listed = any(target == arrow or target.startswith(f"{arrow}.") for arrow in ALLOWED.get(package, ()))
        if not (own or fine or listed):
            wrong.append(f"{name} imports {other}")
    return wrong


def cycle(trees):
    """Modules that import each other in a circle, lazily or not; empty if there is none."""
    graph = {name: {other for other in imports(tree, trees) if other in trees} for name, tree in trees.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def wrong_flax(name, tree):
    """Imports of flax outside of models, `flax.struct` aside."""
    if name.startswith("lmlab.models"):
        return []
    asked = {other for other in imports(tree, {"flax.struct"}) if other.split(".")[0] == "flax"}
    return [f"{name} imports {other}" for other in asked if other.split(".")[:2] != ["flax", "struct"]]


def loaded(name, trees):
    """Heavy packages that importing a module loads, through whatever it imports at module level."""
    seen, queue, heavy = set(), [name], set()
    while queue:
        here = queue.pop()
        if here in seen or here not in trees:
            continue
        seen.add(here)
        # Importing a.b.c runs a and a.b first.
        queue += [here.rpartition(".")[0]]
        for other in imports(trees[here], trees, top_level=True):
            queue.append(other)
            heavy |= {other.split(".")[0]} & HEAVY
    return heavy


def undocumented(name, tree):
    """Public functions, classes and methods without a docstring, an annotation or a return type."""
    wrong = [] if ast.get_docstring(tree) else [f"{name} has no docstring"]

    def visit(scope, inside):
        for node in scope.body:
            if not isinstance(node, Functions | ast.ClassDef):
                continue
            here = f"{inside}.{node.name}"
            special = node.name.startswith("__")
            if node.name.startswith("_") and not special:
                continue
            if not special and not ast.get_docstring(node):
                wrong.append(f"{here} has no docstring")
            if isinstance(node, ast.ClassDef):
                visit(node, here)
            else:
                wrong.extend(f"{here}: {what} has no type" for what in untyped(node, isinstance(scope, ast.ClassDef)))

    visit(tree, name)
    return wrong


def untyped(node, method):
    """Arguments (and `return`) of a function that have no annotation."""
    static = any(isinstance(mark, ast.Name) and mark.id == "staticmethod" for mark in node.decorator_list)
    args = [*node.args.posonlyargs, *node.args.args][1 if method and not static else 0 :]
    rest = [*node.args.kwonlyargs, *filter(None, (node.args.vararg, node.args.kwarg))]
    missing = [arg.arg for arg in [*args, *rest] if arg.annotation is None]
    return missing + ([] if node.returns or node.name == "__init__" else ["return"])


def too_long(name, source):
    """Files over the limit of lines, and functions over that of code: docstrings and blank lines aside."""
    lines = source.splitlines()
    wrong = [f"{name} has {len(lines)} lines"] if len(lines) > FILE_LINES else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, Functions):
            start = node.body[0].end_lineno if ast.get_docstring(node) else node.lineno - 1
            head = node.body[0].lineno - node.lineno if ast.get_docstring(node) else 0
            size = head + sum(bool(line.strip()) for line in lines[start : node.end_lineno])
            wrong += [f"{name}.{node.name} has {size} lines"] if size > FUNCTION_LINES else []
    return wrong


def prints(name, tree):
    """Calls of print outside of the command line. A function `say` prints: it is what callers may replace."""
    if name in ("lmlab.cli", "lmlab.commands"):
        return []
    spoken = {id(node) for f in ast.walk(tree) if isinstance(f, Functions) and f.name == "say" for node in ast.walk(f)}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and id(node) not in spoken]
    named = [node for node in calls if isinstance(node.func, ast.Name) and node.func.id == "print"]
    return [f"{name}:{node.lineno} prints" for node in named]


def private_paths(name, text):
    """Places of one machine in a text: the workplace, and home folders."""
    lines = enumerate(text.splitlines(), start=1)
    return [f"{name}:{number} {line.strip()[:80]}" for number, line in lines if PRIVATE_PATH.search(line)]


def test_imports_go_in_the_allowed_directions():
    assert [wrong for name, tree in TREE.items() for wrong in wrong_arrows(name, tree, TREE)] == []


@pytest.mark.parametrize("rule", [wrong_flax, undocumented, prints])
def test_every_module_keeps_the_rule(rule):
    assert [wrong for name, tree in TREE.items() for wrong in rule(name, tree)] == []


def test_no_modules_import_each_other_in_a_circle():
    assert cycle(TREE) == []


def test_configs_and_the_command_line_load_no_jax():
    light = [name for name in TREE if LIGHT.match(name)]
    assert {"lmlab.cli", "lmlab.recipe", "lmlab.models.config", "lmlab.train.config"} <= set(light)
    assert {name: found for name in light if (found := loaded(name, TREE))} == {}
    # And the interpreter agrees with the reading of the syntax.
    program = f"import sys, {', '.join(light)}; print(sorted({HEAVY} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_files_and_functions_are_short():
    files = [*(ROOT / "lmlab").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    assert [wrong for path in files for wrong in too_long(path.relative_to(ROOT).as_posix(), path.read_text())] == []


def test_no_file_is_a_drawer_of_odds_and_ends():
    names = {path.name for part in ("lmlab", "tests") for path in (ROOT / part).rglob("*.py")}
    assert not names & {"utils.py", "util.py", "helpers.py", "misc.py", "common.py"}


def test_no_text_names_a_place_of_one_machine():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git tree")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode()
    paths = [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]
    blobs = {path.relative_to(ROOT): path.read_bytes() for path in paths}
    texts = {path: blob.decode(errors="replace") for path, blob in blobs.items() if b"\0" not in blob[:8000]}
    assert [wrong for path, text in texts.items() for wrong in private_paths(path, text)] == []


KNOWN = {"lmlab.models", "lmlab.models.lm", "lmlab.models.layers", "lmlab.cli"}
LONG = "def f():\n" + "    x = 1\n" * FUNCTION_LINES
ARROWS = [
    ("core.rng", "from lmlab.core import errors", "import lmlab.models.lm"),
    ("objectives.a", "from lmlab.models import lm", "from lmlab.models import layers"),
    ("objectives.a", "from lmlab.models.lm import LM", "from lmlab.models import LM"),
    ("train.step", "from lmlab.optim.groups import x", "def f():\n    from lmlab.data.open import x"),
    ("train.step", "from lmlab import __version__", "from .state import State"),
    ("testing.tiny", "from lmlab.pretrain import x", "from lmlab import cli"),
    ("data.a", "from lmlab.retrieval.index import x", "from lmlab.models.lm import LM"),
    ("retrieval.a", "from lmlab.core.types import x", "from lmlab.data.graph import x"),
    ("recipe", "from lmlab.data.config import x", "from . import data"),
    ("newcomer.a", "from lmlab.newcomer.b import x", "from lmlab.core.rng import key_for"),
]
RULES = [
    (wrong_flax, "from flax import struct", "from flax import linen, struct"),
    (wrong_flax, "import flax.struct", "import flax"),
    (undocumented, '"""."""\ndef f(a: int) -> int:\n    """."""', '"""."""\ndef f(a: int) -> int: ...'),
    (undocumented, '"""."""\ndef _f(a): ...', '"""."""\ndef f(a) -> int:\n    """."""'),
    (undocumented, '"""."""\nclass _A: ...', '"""."""\nclass A:\n    """."""\n    def f(self) -> int: ...'),
    (undocumented, '"""."""', "x = 1"),
    (prints, "console.print(1)", "def f():\n    print(1)"),
    (prints, "def say(text):\n    print(text)", "def show(text):\n    print(text)"),
]


@pytest.mark.parametrize(("name", "right", "wrong"), ARROWS)
def test_a_wrong_arrow_is_seen(name, right, wrong):
    assert not wrong_arrows(f"lmlab.{name}", ast.parse(right), KNOWN)
    assert wrong_arrows(f"lmlab.{name}", ast.parse(wrong), KNOWN)


@pytest.mark.parametrize(("rule", "right", "wrong"), RULES)
def test_a_broken_rule_is_seen(rule, right, wrong):
    assert not rule("lmlab.train.step", ast.parse(right))
    assert rule("lmlab.train.step", ast.parse(wrong))


def test_lengths_and_private_paths_are_seen():
    assert not too_long("a", LONG.replace("    x = 1\n", "", 1)) + too_long("a", "x = 1\n" * FILE_LINES)
    assert too_long("a", LONG)
    assert too_long("a", "x = 1\n" * (FILE_LINES + 1))
    texts = ["/ho" + "me/x", "/wo" + "rk/x", "~/x", "a/home/x"]
    assert [bool(private_paths("a", f"see {text}")) for text in texts] == [True, True, False, False]


def test_circles_and_heavy_imports_are_seen():
    sources = {"": "", ".a": "from lmlab import b", ".b": "def f():\n import lmlab.c", ".c": "import jax"}
    trees = {f"lmlab{name}": ast.parse(source) for name, source in sources.items()}
    assert cycle(trees) == []
    assert loaded("lmlab.a", trees) == set()
    trees["lmlab.b"] = ast.parse("import lmlab.c")
    assert loaded("lmlab.a", trees) == {"jax"}
    trees["lmlab.c"] = ast.parse("from lmlab.a import x")
    assert {"lmlab.a", "lmlab.b", "lmlab.c"} == set(cycle(trees))
