"""`lmlab plan` and `lmlab doctor --config` as a user meets them."""

from dataclasses import replace

import pytest

from lmlab.cli import main
from lmlab.core.errors import UserError
from lmlab.data.config import Bytes, DataConfig, TokenizerFile, TrainedBPE
from lmlab.models.config import TransformerConfig
from lmlab.plan.command import parse_mesh, plan, shardings, with_known_vocabulary
from lmlab.recipe import Pretrain, load_recipe
from lmlab.train.config import ParallelConfig

SMALL = Pretrain(model=TransformerConfig(vocab_size=512, layers=2, width=128), data=DataConfig(length=64))


def test_a_mesh_is_three_numbers_or_four():
    assert parse_mesh("8x4x2", ParallelConfig()) == {"data": 8, "fsdp": 4, "context": 1, "tensor": 2}
    assert parse_mesh("1X2X3X4", ParallelConfig()) == {"data": 1, "fsdp": 2, "context": 3, "tensor": 4}
    assert parse_mesh("", ParallelConfig(data=0, fsdp=4)) == {"data": 1, "fsdp": 4, "context": 1, "tensor": 1}


@pytest.mark.parametrize(
    "text", ["8x", "0x2x2", "abc", "8", "1x2", "1x1x1x1x1", "-1x2x2", "1.5x2x2", "x", "1x2x99999999"]
)
def test_any_other_mesh_is_refused(text):
    with pytest.raises(UserError, match="mesh"):
        parse_mesh(text, ParallelConfig())


def test_the_vocabulary_is_known_from_the_tokenizer_alone(tmp_path):
    unknown = replace(SMALL, model=replace(SMALL.model, vocab_size=0))
    size = lambda tokenizer: (
        with_known_vocabulary(replace(unknown, data=replace(SMALL.data, tokenizer=tokenizer))).model.vocab_size
    )
    assert size(Bytes()) == 257
    assert size(TrainedBPE(vocab_size=1000)) == 1000
    with pytest.raises(UserError, match=r"--model\.vocab-size"):
        size(TokenizerFile(str(tmp_path / "absent.json")))
    import tokenizers

    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "</s>": 2}, unk_token="a"))
    model.save(str(tmp_path / "tokenizer.json"))
    assert size(TokenizerFile(str(tmp_path / "tokenizer.json"))) == 3


def test_a_plan_says_what_fits_and_what_does_not():
    small = plan(replace(SMALL, model=replace(SMALL.model, execution=BF16)), "2x2x2", "v5e", "none", 0.4)
    assert "8 x v5e: data 2 x fsdp 2 x context 1 x tensor 2" in small
    assert "\nfits: " in small
    assert "what to change" not in small
    large = plan(load_recipe("configs/llama_70b.py")[1], "1x8x1", "h100", "none", 0.4)
    assert "DOES NOT FIT: " in large
    assert "more fsdp" in large.partition("what to change:")[2]


BF16 = replace(SMALL.model.execution, compute_dtype="bfloat16")


@pytest.mark.parametrize("name", ["llama_124m", "llama_1b", "llama_8b", "llama_70b"])
def test_the_recipes_fit_where_their_headers_say(name):
    recipe = load_recipe(f"configs/{name}.py")[1]
    chip = "v5e" if name in ("llama_124m", "llama_1b") else "v5p"
    mesh = "8x1x1" if name == "llama_124m" else ""
    assert "\nfits: " in plan(recipe, mesh, chip, "none", 0.4)


def test_the_table_of_shardings_adds_up():
    text = shardings(SMALL, "1x4x2")
    assert "(tensor, fsdp)" in text
    assert "layers embed stack ffn" in text
    assert "float" not in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["plan", "configs/demo.py", "--mesh", "8x"], "8x4x2"),
        (["plan", "configs/demo.py", "--chip", "v5f"], "Did you mean v5"),
        (["plan", "configs/demo.py", "--mesh", "1x1x4"], "kv_heads"),
        (["plan", "configs/demo.py", "--mesh", "16x1x1"], "data.batch_size"),
        (["plan", "configs/demo.py", "--mfu", "0"], "mfu"),
        (["doctor", "--config", "configs/demo.py", "--mesh", "1x5x1"], "'embed' of embedding"),
        (["doctor", "--mesh", "1x5x1"], "--config"),
    ],
)
def test_what_cannot_be_is_told_in_one_line_with_exit_code_2(words, said, capsys):
    assert main(words) == 2
    shown = capsys.readouterr()
    assert said in shown.err
    assert len(shown.err.splitlines()) == 1
