"""The text side of a folder: what its files say, the same after writing, and the same in transformers."""

import json

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from lmlab.core.errors import UserError
from lmlab.data.chat import ChatTemplate, render
from lmlab.data.tokenizers import byte_tokenizer, load_tokenizer
from lmlab.inference.config import SamplingConfig
from lmlab.interop.tokenizer_files import TokenizerFiles, read_tokenizer_files, write_tokenizer_files

CHAT = "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
MESSAGES = [{"role": "user", "content": "Hello é\n 漢"}, {"role": "assistant", "content": " the <s> 12"}]
TEXTS = ["", "the Hello 12", " é\n\n漢字 🧑‍🚀", "<|im_start|>the<s>", "\x00 \r\n\t"]
SPECIAL = ["<s>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"]


def vocabulary() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = Tokenizer(
        models.BPE({token: i for i, token in enumerate([*alphabet, "th", "Ġth"])}, [("t", "h"), ("Ġ", "th")])
    )
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    return model


def begins_with_s() -> Tokenizer:
    model = vocabulary()
    template = processors.TemplateProcessing(
        single="<s> $A <|im_end|>", special_tokens=[("<s>", 258), ("<|im_end|>", 260)]
    )
    model.post_processor = processors.Sequence([processors.ByteLevel(), template])
    return model


@pytest.fixture
def folder(tmp_path):
    def make(model: Tokenizer, **files: object):
        path = tmp_path / "model"
        path.mkdir(exist_ok=True)
        model.save(str(path / "tokenizer.json"))
        for name, value in files.items():
            (path / f"{name}.json").write_text(json.dumps(value))
        return path

    return make


BEGIN, END = ({"__type": "AddedToken", "content": name, "special": True} for name in ("<s>", "<|im_end|>"))
CASES = {
    "post_processor": (begins_with_s, {"bos_token": "<s>", "eos_token": "<|im_end|>"}, (258,), (260,)),
    "asked_too": (vocabulary, {"bos_token": BEGIN, "eos_token": END, "add_bos_token": True}, (), (260,)),
    "not_asked": (
        begins_with_s,
        {"bos_token": "<s>", "eos_token": "<|im_end|>", "add_bos_token": False},
        (258,),
        (260,),
    ),
    "new_bos": (vocabulary, {"bos_token": "<begin>", "eos_token": "<|im_end|>"}, (), (260,)),
    "no_config": (vocabulary, {}, (), (261,)),
    "new_eos": (vocabulary, {"eos_token": "<stop>"}, (), (262,)),
}


@pytest.mark.parametrize("case", CASES)
def test_what_texts_begin_and_end_with(folder, case):
    make, config, begin, ends = CASES[case]
    tokenizer = read_tokenizer_files(folder(make(), tokenizer_config=config)).tokenizer
    assert (tokenizer.begin_ids, tokenizer.end_ids, tokenizer.end_id) == (begin, ends, ends[-1])
    assert tokenizer.encode_batch(["th"])[0].tolist() == [256]


def test_ends_of_generation_come_first(folder):
    config, generation = {"eos_token": "<|im_end|>"}, {"eos_token_id": [261, 260]}
    files = read_tokenizer_files(folder(vocabulary(), tokenizer_config=config, generation_config=generation))
    assert files.tokenizer.end_ids == (261, 260)
    one = read_tokenizer_files(folder(vocabulary(), tokenizer_config=config, generation_config={"eos_token_id": 258}))
    assert one.tokenizer.end_ids == (258, 260)
    bare = read_tokenizer_files(
        folder(vocabulary(), tokenizer_config={"a": 1}, generation_config={"eos_token_id": 260})
    )
    assert (bare.tokenizer.end_ids, bare.tokenizer.end_id) == ((260,), 260)


@pytest.mark.parametrize(
    ("generation", "sampling"),
    [
        ({}, None),
        ({"eos_token_id": 260}, None),
        ({"do_sample": False, "temperature": 0.7}, SamplingConfig(temperature=0.0)),
        ({"do_sample": True}, SamplingConfig()),
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20},
            SamplingConfig(temperature=0.6, top_k=20, top_p=0.9),
        ),
        ({"do_sample": True, "temperature": None, "max_new_tokens": 7}, SamplingConfig()),
    ],
)
def test_sampling_of_the_makers_survives(folder, generation, sampling, tmp_path):
    files = read_tokenizer_files(folder(vocabulary(), tokenizer_config={"a": 1}, generation_config=generation))
    assert files.sampling == sampling
    write_tokenizer_files(tmp_path, files)
    assert read_tokenizer_files(tmp_path).sampling == sampling


def test_chat_templates_as_files_state_them(folder):
    def source(**config):
        return read_tokenizer_files(folder(vocabulary(), tokenizer_config={"a": 1, **config})).chat

    assert source() is None
    assert source(chat_template=CHAT, bos_token="<s>") == ChatTemplate(CHAT, {"bos_token": "<s>"})
    named = [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]
    assert source(chat_template=named).source == "d"
    assert source(chat_template=named[:1]).source == "t"
    with pytest.raises(UserError, match=r"list of \{name, template}"):
        source(chat_template=["t"])
    path = folder(vocabulary(), special_tokens_map={"bos_token": {"content": "<s>"}})
    (path / "chat_template.jinja").write_text("file")
    assert source(chat_template=CHAT) == ChatTemplate("file", {"bos_token": "<s>"})


def example(folder) -> TokenizerFiles:
    config = {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": CHAT}
    generation = {"eos_token_id": [260, 261], "do_sample": True, "top_p": 0.5}
    return read_tokenizer_files(folder(begins_with_s(), tokenizer_config=config, generation_config=generation))


def assert_same(one: TokenizerFiles, other: TokenizerFiles):
    assert (one.chat, one.sampling) == (other.chat, other.sampling)
    for name in ("begin_ids", "end_ids", "end_id", "vocab_size", "fingerprint"):
        assert getattr(one.tokenizer, name) == getattr(other.tokenizer, name)
    for left, right in zip(one.tokenizer.encode_batch(TEXTS), other.tokenizer.encode_batch(TEXTS), strict=True):
        np.testing.assert_array_equal(left, right)


def test_written_files_say_the_same_to_both_readers(folder, tmp_path):
    files = example(folder)
    write_tokenizer_files(tmp_path, files)
    assert_same(read_tokenizer_files(tmp_path), files)
    assert_same(TokenizerFiles(load_tokenizer(tmp_path), files.chat, files.sampling), files)


def test_a_run_folder_without_the_files_of_a_model(tmp_path):
    byte_tokenizer().save(tmp_path)
    files = read_tokenizer_files(tmp_path)
    assert (files.tokenizer.fingerprint, files.chat, files.sampling) == ("bytes-1", None, None)


def test_bytes_are_written_as_a_vocabulary(tmp_path, folder):
    files = TokenizerFiles(byte_tokenizer(), None, None)
    write_tokenizer_files(tmp_path, files)
    read = read_tokenizer_files(tmp_path).tokenizer
    assert (read.begin_ids, read.end_ids, read.vocab_size) == ((256,), (256,), 257)
    for one, other in zip(read.encode_batch(TEXTS), files.tokenizer.encode_batch(TEXTS), strict=True):
        np.testing.assert_array_equal(one, other)
        assert read.decode(one) == files.tokenizer.decode(other)


def test_gpt2_files_without_a_tokenizer_json(tmp_path):
    model = vocabulary()
    model.model.save(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}'
    )
    read = read_tokenizer_files(tmp_path).tokenizer
    assert read.encode_batch(["the th é"])[0].tolist() == model.encode("the th é").ids
    assert (read.begin_ids, read.end_ids) == ((), (258,))
    begins = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(begins))
    read = read_tokenizer_files(tmp_path).tokenizer
    assert (read.begin_ids, read.end_ids) == ((258,), (259,))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    with pytest.raises(UserError, match=r"folder with tokenizer.json.*save_pretrained"):
        read_tokenizer_files(tmp_path)


def test_faults(folder, tmp_path):
    with pytest.raises(UserError, match="existing folder"):
        read_tokenizer_files(tmp_path / "none")
    with pytest.raises(UserError, match=r"folder with tokenizer.json"):
        read_tokenizer_files(tmp_path)
    path = folder(vocabulary(), tokenizer_config=[1])
    with pytest.raises(UserError, match="a JSON object, not list"):
        read_tokenizer_files(path)
    (path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config.json.*a file of JSON"):
        read_tokenizer_files(path)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "gpt_neox", "mistral"])
def test_transformers_reads_what_is_written(folder, tmp_path, family):
    transformers = pytest.importorskip("transformers", reason="the peer to compare with: pip install lmlab[peers]")
    files = example(folder)
    write_tokenizer_files(tmp_path, files)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text, ids_T in zip(TEXTS, files.tokenizer.encode_batch(TEXTS), strict=True):
        marked_T, _ = files.tokenizer.encode_marked(text)
        assert peer(text)["input_ids"] == [*files.tokenizer.begin_ids, *marked_T]
        assert peer.decode(ids_T, skip_special_tokens=True) == files.tokenizer.decode(ids_T)
    assert peer.apply_chat_template(MESSAGES, tokenize=False) == render(files.chat, MESSAGES)
    assert (peer.eos_token_id, peer.bos_token_id, peer.pad_token_id) == (260, 258, 261)
    generation = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert (generation.eos_token_id, generation.top_p, generation.do_sample) == ([260, 261], 0.5, True)


@pytest.mark.parametrize("case", CASES)
def test_transformers_adds_the_same_beginning(folder, case):
    transformers = pytest.importorskip("transformers", reason="the peer to compare with: pip install lmlab[peers]")
    make, config, begin, _ = CASES[case]
    path = folder(make(), tokenizer_config=config | {"tokenizer_class": "PreTrainedTokenizerFast"})
    ids = transformers.AutoTokenizer.from_pretrained(path)("th")["input_ids"]
    assert ids[: ids.index(256)] == list(begin)
