"""A run grows into a larger run: it begins with the same numbers, trains on, and is refused where it cannot be."""

import json
from dataclasses import replace
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import pytest

from lmlab.cli import main
from lmlab.core.errors import UserError
from lmlab.data.config import DataConfig, Files
from lmlab.growing import grow_run, grow_state
from lmlab.loading import export
from lmlab.models.config import AttentionConfig, GrowthConfig, ParameterTokens, TokenFormerConfig, TransformerConfig
from lmlab.models.growth import grown_config
from lmlab.optim.chain import build_optimizer
from lmlab.optim.config import OptimConfig
from lmlab.pretrain import pretrain
from lmlab.recipe import EvalConfig, Pretrain, load_recipe
from lmlab.runs import load_run
from lmlab.train.config import ParallelConfig, TrainConfig
from lmlab.train.folder import read_config
from lmlab.train.state import init_state
from lmlab.training import build_lm

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SMALL = TokenFormerConfig(
    layers=2, width=16, max_length=32, attention=AttentionConfig(heads=2), parameter_tokens=ParameterTokens(8)
)
LARGE = replace(SMALL, parameter_tokens=ParameterTokens(12, 8, 40))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A run of the small model, and its recipe."""
    folder = tmp_path_factory.mktemp("growing")
    texts = [f"document {i} " * (i % 5 + 3) for i in range(40)]
    (folder / "corpus.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    recipe = Pretrain(
        model=SMALL,
        data=DataConfig(
            sources={"text": Files(str(folder / "corpus.jsonl"), heldout_percent=20)}, length=16, batch_size=4,
            cache_dir=str(folder / "cache"),
        ),
        optim=OptimConfig(),
        train=TrainConfig(steps=4, log_every=1, eval_every=4, sample_every=0, checkpoint_every=2),
        parallel=ParallelConfig(data=1),
        eval=EvalConfig(batches=1, prompts=(), baselines=False),
    )  # fmt: skip
    pretrain(recipe, folder / "small")
    return folder / "small", recipe


def logits(folder):
    run = load_run(folder)
    tokens = jnp.arange(12).reshape(2, 6) + 97
    return run.lm.logits(run.params, run.lm.apply(run.params, tokens)[0])


@pytest.mark.parametrize("optimizer", ["reset", "extend"])
def test_a_grown_run_begins_where_the_small_one_stands_and_trains_on(source, tmp_path, optimizer):
    small, recipe = source
    out = tmp_path / "large"
    config = grow_run(small, replace(recipe, model=LARGE), out, GrowthConfig(optimizer=optimizer))
    assert config == read_config(out)
    assert config.model.references == SMALL.counts
    chex.assert_trees_all_close(logits(out), logits(small), atol=1e-6)
    outcome = pretrain(config, out)
    assert outcome.step == 4
    assert not jnp.allclose(logits(out), logits(small), atol=1e-3)


def test_moments_are_extended_or_new(source):
    recipe = replace(source[1], model=replace(SMALL, vocab_size=9))
    large = replace(recipe, model=grown_config(recipe.model, LARGE.parameter_tokens, GrowthConfig()))
    lm = build_lm(recipe)
    state = init_state(lm.init, build_optimizer(recipe.optim, lm.axes, 4), 0)
    state = replace(state, step=state.step + 3, opt_state=jax.tree.map(jnp.ones_like, state.opt_state))
    new, extended = (grow_state(state, recipe.model, large, GrowthConfig(optimizer=how)) for how in ("reset", "extend"))
    assert int(new.step) == int(extended.step) == 0
    chex.assert_trees_all_equal(new.params, extended.params)
    moments = lambda state: state.opt_state[1].mu["layers"]["ffn"]["values"]
    assert not moments(new).any()
    assert jnp.all(moments(extended)[:, :32] == 1)
    assert not moments(extended)[:, 32:].any()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (replace(LARGE, width=32), "model.width = 32: expected 16, as in the model that grows"),
        (replace(LARGE, parameter_tokens=ParameterTokens(4)), r"model.parameter_tokens.qkv = 4: expected at least 8"),
        (TransformerConfig(layers=2, width=16), "TransformerConfig of the recipe.*only those grow"),
    ],
)
def test_what_cannot_grow_is_named_and_nothing_is_written(source, tmp_path, model, message):
    small, recipe = source
    with pytest.raises(UserError, match=message):
        grow_run(small, replace(recipe, model=model), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_a_run_is_left_alone(source):
    small, recipe = source
    with pytest.raises(UserError, match="one that holds no run"):
        grow_run(small, replace(recipe, model=LARGE), small)


def test_no_family_of_transformers_has_it(source, tmp_path):
    with pytest.raises(UserError, match=r"expected a transformer\. No family"):
        export(source[0], tmp_path / "out")


def test_its_fields_are_options_of_the_command_line(capsys):
    with pytest.raises(SystemExit):
        main(["run", str(CONFIGS / "tokenformer_large.py"), "--help"])
    said = capsys.readouterr().out
    assert "--model.parameter-tokens.qkv" in said
    assert "--model.mlp" not in said
    assert load_recipe(str(CONFIGS / "tokenformer_large.py"))[1].model.counts == ParameterTokens(576, 576, 2304)
