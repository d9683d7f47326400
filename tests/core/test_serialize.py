"""Configs survive JSON with their types; what this version does not know is refused."""

import dataclasses
import json

import pytest

from lmlab.core.errors import UserError
from lmlab.core.serialize import from_json, to_json
from lmlab.data.config import Bytes, DataConfig, Files, PythonLibrary, Tfds, TokenizerFile, TrainedBPE
from lmlab.inference.config import SamplingConfig
from lmlab.models.config import AttentionConfig, TransformerConfig
from lmlab.objectives.config import NextTokenConfig
from lmlab.optim.config import OptimConfig, ScheduleConfig
from lmlab.recipe import EvalConfig, Pretrain
from lmlab.train.config import TrainConfig

SOURCES = {
    "python": PythonLibrary(7),
    "mine": Files("a/**/*.txt", "b.txt"),
    "lm1b": Tfds("lm1b", text_field="body"),
}


def through_text(config):
    return from_json(json.loads(json.dumps(to_json(config))))


@pytest.mark.parametrize("tokenizer", [Bytes(), TokenizerFile("tokenizer.json", "</s>"), TrainedBPE(300)])
def test_a_whole_recipe_comes_back_equal(tokenizer):
    recipe = Pretrain(
        model=TransformerConfig(width=64, attention=AttentionConfig(heads=8, kv_heads=2), tied=False),
        data=DataConfig(sources=SOURCES, weights={"mine": 1 / 3}, tokenizer=tokenizer, length=8),
        objective=NextTokenConfig(z_loss=1e-4),
        optim=OptimConfig(rule="muon", schedule=ScheduleConfig(peak=0.1 + 0.2), no_decay=("a", "b")),
        train=TrainConfig(steps=3),
        eval=EvalConfig(prompts=("", 'quotes " and\nlines é'), sampling=SamplingConfig(stop=("\n\n",))),
    )
    back = through_text(recipe)
    assert back == recipe
    assert type(back.data.tokenizer) is type(tokenizer)
    assert [type(source) for source in back.data.sources.values()] == [PythonLibrary, Files, Tfds]


def test_defaults_come_back_equal_and_are_named_by_class():
    assert through_text(Pretrain()) == Pretrain()
    assert to_json(Pretrain())["data"]["tokenizer"] == {"class": "lmlab.data.config:Bytes"}


def test_a_source_cannot_take_the_name_that_marks_classes():
    # Where it is refused, before or while writing, does not matter; a file that cannot be read back does.
    with pytest.raises(UserError, match="class"):
        to_json(DataConfig(sources={"class": PythonLibrary()}))


@pytest.mark.parametrize("name", ["name", "model", "sources"])
def test_a_source_may_have_any_other_name(name):
    config = DataConfig(sources={name: PythonLibrary()}, weights={name: 2.0})
    assert through_text(config) == config


def test_a_field_that_is_absent_takes_its_default():
    assert from_json({"class": "lmlab.train.config:TrainConfig", "steps": 3}) == TrainConfig(steps=3)


def test_an_unknown_field_is_named():
    data = to_json(Pretrain())
    data["train"]["stepz"] = 3
    with pytest.raises(UserError, match="stepz"):
        from_json(data)


@pytest.mark.parametrize(
    "name",
    ["os:system", "pathlib:Path", "lmlabx.core:Evil", "lmlab.train.config:Absent", "lmlab.absent:TrainConfig",
     "lmlab", "", "lmlab.train.config:", "lmlab.core.errors:check", "lmlab.core.errors:UserError",
     "lmlab.cli:Path", None],
)  # fmt: skip
def test_what_is_no_config_class_of_lmlab_is_refused(name):
    with pytest.raises(UserError, match="class"):
        from_json({"class": name})


def test_values_out_of_range_are_refused_on_the_way_back():
    data = to_json(SamplingConfig()) | {"top_p": 2.0}
    with pytest.raises(UserError, match="top_p"):
        from_json(data)


def test_a_recipe_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Pretrain().train = TrainConfig()
