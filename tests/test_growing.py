"""A run grows into a larger one by the command line: same loss, any mesh, goes on; what cannot grow is refused."""

import json
import shutil
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import pytest
from tiny_run import contents, one_line, rows

import lmlab.training
from lmlab.cli import main
from lmlab.core.errors import UserError
from lmlab.growing import grown_state
from lmlab.loading import export
from lmlab.models.config import AttentionConfig, GrowthConfig, ParameterTokens, TokenFormerConfig
from lmlab.models.growth import grown_config
from lmlab.optim.chain import build_optimizer
from lmlab.recipe import Grown, Pretrain, load_recipe
from lmlab.runs import load_run
from lmlab.train.folder import read_config
from lmlab.train.state import init_state
from lmlab.training import build_lm

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
RECIPE = """
from lmlab.data.config import DataConfig, Files, TokenizerFile, TrainedBPE
from lmlab.models.config import *
from lmlab.recipe import *
from lmlab.train.config import ParallelConfig, TrainConfig

def recipe():
    shape = dict(layers=2, width=16, max_length=32, attention=AttentionConfig(heads=2))
    return Pretrain(
        model=MODEL,
        data=DataConfig(
            sources={"text": Files("CORPUS.jsonl", heldout_percent=20)}, tokenizer=TrainedBPE(260), length=16,
            batch_size=8,
        ),
        train=TrainConfig(steps=4, log_every=1, eval_every=2, sample_every=0, checkpoint_every=2),
        parallel=ParallelConfig(data=1),
        eval=EvalConfig(batches=0, baselines=False),
    )
"""
MODELS = {
    "small": "TokenFormerConfig(parameter_tokens=ParameterTokens(8), **shape)",
    "large": "TokenFormerConfig(parameter_tokens=ParameterTokens(12, 8, 40), **shape)",
    "dense": "TransformerConfig(**shape)",
}
RECIPES = {"heads": "MultiToken(heads=2,", "grown": "Grown(source='', growth=GrowthConfig(),"}
grow = lambda source, *words: ["grow", source, "--to", "large.py", "--out", "out", *words]
GROW = grow("runs/small")
EXTEND = ["--values", "zeros", "--optimizer", "extend"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder of recipes, with a run of the small model and one that has grown out of it."""
    folder = tmp_path_factory.mktemp("growing")
    for name, model in MODELS.items():
        (folder / f"{name}.py").write_text(RECIPE.replace("MODEL", model).replace("CORPUS", "corpus"))
    large = (folder / "large.py").read_text()
    for name, recipe in RECIPES.items():
        text = (folder / "small.py").read_text().replace("Pretrain(", recipe)
        (folder / f"{name}.py").write_text(text.replace("layers=2", "layers=3"))
    (folder / "other_text.py").write_text(large.replace("corpus", "other"))
    named = large.replace("corpus", "other").replace("TrainedBPE(260)", "TokenizerFile('runs/small/tokenizer.json')")
    (folder / "same_tokens.py").write_text(named)
    for name, word in (("corpus", "document"), ("other", "something else")):
        texts = [f"{word} {i} " * (i % 5 + 3) for i in range(40)]
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["run", "small.py"]) == 0
        assert main(["grow", "runs/small", "--to", "large.py"]) == 0
        patch.setattr(lmlab.training, "write_report", lambda folder: None)
        assert main(["grow", "runs/small", "--to", "large.py", *EXTEND, "--out", "extended"]) == 0
    return folder


@pytest.fixture
def here(trained, tmp_path, monkeypatch) -> Path:
    """A copy to work in, where no time goes to reports."""
    shutil.copytree(trained, tmp_path / "here")
    monkeypatch.setattr(lmlab.training, "write_report", lambda folder: None)
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def held_out(run: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in rows(run, "eval")}


def test_the_loss_at_growth_is_that_of_the_small_run_and_falls(trained):
    small, large = held_out(trained / "runs/small"), held_out(trained / "runs/large")
    assert (list(small), list(large)) == ([2, 4], [0, 2, 4])
    assert large[0] == pytest.approx(small[4], abs=1e-5)
    assert large[4] < large[0] - 0.01
    config = read_config(trained / "runs/large")
    assert (config.source, config.growth) == ("runs/small", GrowthConfig())
    assert config.model.counts == ParameterTokens(12, 8, 40)
    assert config.model.references == ParameterTokens(8, 8, 32)
    assert (trained / "runs/large/report.html").is_file()


def test_with_the_state_of_the_optimiser(trained):
    losses = held_out(trained / "extended")
    assert losses[0] == pytest.approx(held_out(trained / "runs/small")[4], abs=1e-5)
    assert losses[4] < losses[0]


def test_as_the_authors_code_does(here, capsys):
    before = contents(here / "runs/small")
    assert main([*GROW, "--keys", "normal", "--tau", "follow"]) == 0
    assert "grown from runs/small" in capsys.readouterr().out
    losses = held_out(here / "out")
    assert abs(losses[0] - held_out(here / "runs/small")[4]) > 1e-5
    assert losses[4] < losses[0]
    assert contents(here / "runs/small") == before


def test_a_chain_of_growths_and_fields_of_the_recipe_as_options(here):
    # After growth everywhere, along the feed-forward alone.
    more = ["--model.parameter-tokens.ffn", "48", "--train.steps", "1", "--out", "larger"]
    assert main(["grow", "runs/large", "--to", "large.py", *more]) == 0
    losses = held_out(here / "larger")
    assert list(losses) == [0, 1]
    assert losses[0] == pytest.approx(held_out(here / "runs/large")[4], abs=1e-5)
    model = read_config(here / "larger").model
    assert (model.counts, model.references) == (ParameterTokens(12, 8, 48), ParameterTokens(8, 8, 32))


def test_interrupted_and_run_again_without_its_source_it_is_the_same_run(here, trained, monkeypatch, capsys):
    save = lmlab.training.save

    def save_then_stop(*args):
        save(*args)
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(lmlab.training, "save", save_then_stop)
        assert main(GROW) == 128 + signal.SIGTERM
    # What it began as is needed no more.
    shutil.rmtree(here / "runs/small")
    assert main(GROW) == 0
    assert "resuming at step 3" in capsys.readouterr().out
    assert rows(here / "out", "train", "eval") == rows(trained / "runs/large", "train", "eval")
    chex.assert_trees_all_equal(load_run(here / "out").params, load_run(trained / "runs/large").params)


def test_killed_before_its_first_checkpoint_a_run_begins_anew(here, trained):
    half = here / "runs/large"
    shutil.rmtree(half / "checkpoints")
    (half / "report.html").unlink()
    assert main(["grow", "runs/small", "--to", "large.py"]) == 0
    assert rows(half, "train", "eval") == rows(trained / "runs/large", "train", "eval")


def test_a_mesh_changes_no_number(here):
    mesh = ["--parallel.data", "2", "--parallel.fsdp", "2", "--parallel.tensor", "2"]
    assert main([*GROW, *EXTEND, *mesh]) == 0
    assert held_out(here / "out") == pytest.approx(held_out(here / "extended"), rel=1e-4)


def test_master_weights_in_float32_grow(here):
    half = ["--train.steps", "1", "--optim.parameters", "bfloat16_master"]
    assert main(["run", "small.py", *half, "--out", "half"]) == 0
    assert main(["grow", "half", "--to", "large.py", *half, "--optimizer", "extend", "--out", "out"]) == 0
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(load_run(here / "out").params)} == {"bfloat16"}
    assert held_out(here / "out")[0] == pytest.approx(held_out(here / "half")[1], abs=1e-5)


def test_of_a_run_with_several_heads_the_first_grows(here, capsys):
    assert main(["run", "heads.py", "--train.steps", "1", "--out", "heads"]) == 0
    words = ["grow", "heads", "--to", "large.py", "--train.steps", "1", "--out", "out"]
    before = contents(here)
    assert main([*words, "--optimizer", "extend"]) == 2
    assert "--optimizer = 'extend': expected reset" in one_line(capsys)
    assert contents(here) == before
    # So slowly that nothing learns: the parameters at the end are those that it began with.
    assert main([*words, "--optim.schedule.peak", "1e-30"]) == 0
    old, new = load_run(here / "heads").params, load_run(here / "out").params
    corner = lambda new, old: new[tuple(map(slice, old.shape))]
    chex.assert_trees_all_equal(jax.tree.map(corner, new, old), old)


def test_other_text_is_read_with_the_tokens_of_the_source(here, capsys):
    words = ["grow", "runs/small", "--out", "out", "--to"]
    assert main([*words, "other_text.py"]) == 2
    assert "that of runs/small" in one_line(capsys)
    assert main([*words, "same_tokens.py", "--train.steps", "1"]) == 0
    chex.assert_trees_all_equal(*(load_run(here / name).text.tokenizer.token_bytes_V for name in ("out", "runs/small")))


RUDE = [
    ("no such run", ("run folder = 'nowhere'", "config.json"), grow("nowhere")),
    ("no such recipe", ("recipe = 'absent.py'",), (*GROW, "--to", "absent.py")),
    ("a run that has saved nothing", ("runs/empty", "checkpoint"), grow("runs/empty")),
    ("a recipe of something else", ("TransformerConfig of the recipe", "only those"), (*GROW, "--to", "dense.py")),
    ("a run of something else", ("TransformerConfig of runs/dense",), grow("runs/dense")),
    ("another vocabulary", ("model.vocab_size = 300", "260"), (*GROW, "--model.vocab-size", "300")),
    ("another width", ("model.width = 32: expected 16",), (*GROW, "--model.width", "32")),
    ("more layers", ("model.layers = 3: expected 2",), (*GROW, "--model.layers", "3")),
    ("fewer tokens", ("parameter_tokens.qkv = 4", "at least 8"), (*GROW, "--model.parameter-tokens.qkv", "4")),
    ("a tau of the recipe's own", ("model.reference", "--tau"), (*GROW, "--model.reference.qkv", "9")),
    ("another rule's state", ("one of the same rule",), (*GROW, "--optim.rule", "lion", "--optimizer", "extend")),
    ("the source as the target", ("now 'lmlab.recipe:Grown'", "--out"), (*GROW, "--out", "runs/small")),
    ("the folder of another growth", ("tau was 'keep'",), (*GROW, "--tau", "follow", "--out", "runs/large")),
    ("factored moments", ("factored", "reset"), grow("runs/factored", "--optim.rule", "adafactor", *EXTEND)),
    ("softmax", ("model.normalisation = 'softmax'", "has weight"), grow("runs/softmax")),
    ("a recipe of growth to run", ("grown.py", "not Grown", "lmlab grow RUN --to"), ("run", "grown.py")),
    ("another run than growth", ("was 'lmlab.recipe:Grown'", "--out"), ("run", "large.py")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "said", "words"), RUDE, ids=[case[0] for case in RUDE])
def test_rude_input_gets_one_line_and_loses_nothing(name, said, words, here, capsys):
    shutil.copytree("runs/small", "runs/empty")
    shutil.rmtree("runs/empty/checkpoints")
    config = json.loads(Path("runs/small/config.json").read_text())
    others = {
        "dense": {"model": {"class": "lmlab.models.config:TransformerConfig", "vocab_size": 260}},
        "softmax": {"model": config["model"] | {"normalisation": "softmax"}},
        "factored": {"optim": config["optim"] | {"rule": "adafactor"}},
    }
    for other, changes in others.items():
        shutil.copytree("runs/small", f"runs/{other}")
        Path(f"runs/{other}/config.json").write_text(json.dumps(config | changes))
    before = contents(Path())
    assert main(list(words)) == 2
    line = one_line(capsys)
    assert [part for part in said if part not in line] == [], line
    assert contents(Path()) == before


@pytest.mark.parametrize(("words", "missing"), [(["runs/small"], "--to"), (["--to", "large.py"], "STR")])
def test_what_is_left_out_is_named(words, missing, here, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["grow", *words])
    assert f"Missing from lmlab grow: {missing}" in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_moments_are_extended_or_new():
    small = TokenFormerConfig(
        vocab_size=9, layers=2, width=16, attention=AttentionConfig(heads=2), parameter_tokens=ParameterTokens(8)
    )
    recipe = Pretrain(model=small)
    lm = build_lm(recipe)
    state = init_state(lm.init, build_optimizer(recipe.optim, lm.axes, 4), 0)
    state = replace(state, step=state.step + 3, opt_state=jax.tree.map(jnp.ones_like, state.opt_state))

    def grown(optimizer):
        growth = GrowthConfig(optimizer=optimizer)
        model = grown_config(small, ParameterTokens(12, 8, 40), growth)
        config = Grown(model=model, source="", growth=growth)
        tx = build_optimizer(recipe.optim, build_lm(config).axes, 4)
        return jax.jit(partial(grown_state, small=small, config=config, tx=tx))(state.params, state.opt_state)

    new, extended = grown("reset"), grown("extend")
    assert int(new.step) == int(extended.step) == 0
    chex.assert_trees_all_equal(new.params, extended.params)
    moments = lambda state: state.opt_state[1].mu["layers"]["ffn"]["values"]
    assert not moments(new).any()
    assert jnp.all(moments(extended)[:, :32] == 1)
    assert not moments(extended)[:, 32:].any()


def test_a_grown_run_is_a_model_as_any_other(here, capsys):
    assert main(["generate", "runs/large", "--prompt", "ab", "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out.startswith("ab")
    assert main(["eval", "runs/large"]) == 0
    assert main(["report", "runs/large"]) == 0


def test_no_family_of_transformers_has_it(here):
    with pytest.raises(UserError, match=r"expected a transformer\. No family"):
        export(Path("runs/large"), Path("exported"))


def test_fields_of_the_recipe_are_options(capsys):
    with pytest.raises(SystemExit):
        main(["grow", "run", "--to", str(CONFIGS / "tokenformer_large.py"), "--help"])
    said = capsys.readouterr().out
    assert "--model.parameter-tokens.qkv" in said
    assert "--keys" in said
    assert "--model.mlp" not in said
    assert load_recipe(str(CONFIGS / "tokenformer_large.py"))[1].model.counts == ParameterTokens(576, 576, 2304)
