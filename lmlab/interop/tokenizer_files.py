"""What a model's folder says about text: tokenizer, chat template, how its makers sample; read and written."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from lmlab.core.errors import UserError, check
from lmlab.data.chat import ChatTemplate
from lmlab.data.tokenizers import (
    RECORD,
    TextTokenizer,
    find_end_token,
    load_tokenizer,
    read_tokenizer,
    wrap_tokenizer,
)  # fmt: skip
from lmlab.inference.config import SamplingConfig

_MODEL, _CONFIG, _CHAT, _GENERATION = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json",
)  # fmt: skip
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class TokenizerFiles:
    """The text side of a model."""

    tokenizer: TextTokenizer
    """`begin_ids`: what the tokenizer puts in front by itself; `end_ids`: those of generation, then its own end."""
    chat: ChatTemplate | None
    sampling: SamplingConfig | None
    """How its makers draw tokens; None: they do not say. Length and stop texts are the caller's."""


def read_tokenizer_files(folder: Path) -> TokenizerFiles:
    """The text side of a Hugging Face folder, or of a run folder.

    Read are tokenizer.json (or the vocab.json and merges.txt of a GPT-2 tokenizer), tokenizer_config.json,
    special_tokens_map.json, chat_template.jinja and generation_config.json; all but the first may be absent.

    Raises:
        UserError: no tokenizer, one that the `tokenizers` library cannot read, or a file that is not JSON.
    """
    check(folder.is_dir(), "model", str(folder), "an existing folder")
    config = _read_json(folder / _CONFIG)
    if not config and (folder / RECORD).is_file():  # A run that was not given the files of a model.
        return TokenizerFiles(load_tokenizer(folder), None, None)
    generation = _read_json(folder / _GENERATION) or _read_json(folder / "config.json")
    specials = _specials(_read_json(folder / "special_tokens_map.json") | config)
    source = _chat_source(folder, config)
    return TokenizerFiles(
        _tokenizer(folder, config, specials, _ids(generation.get("eos_token_id"))),
        ChatTemplate(source, specials) if source else None,
        _sampling(_read_json(folder / _GENERATION)),
    )


def write_tokenizer_files(folder: Path, files: TokenizerFiles) -> None:
    """Write what `read_tokenizer_files` reads, and `load_tokenizer`; transformers gives the same ids and chats.

    A tokenizer of bytes is written as a byte-level vocabulary without merges: the same ids for every text.
    """
    tokenizer = files.tokenizer
    tokenizer.save(folder)
    if not (folder / _MODEL).is_file():
        _byte_vocabulary(tokenizer).save(folder)
    model = read_tokenizer(folder / _MODEL)
    named = _specials(files.chat.specials if files.chat else {})
    named["eos_token"] = str(model.id_to_token(tokenizer.end_id))
    if tokenizer.begin_ids:
        named.setdefault("bos_token", str(model.id_to_token(tokenizer.begin_ids[0])))
    # The class that reads tokenizer.json as it is.
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **named}
    _write_json(folder / _CONFIG, config)
    if files.chat:
        (folder / _CHAT).write_text(files.chat.source, encoding="utf-8")
    _write_json(folder / _GENERATION, _generation(tokenizer, files.sampling))


def _tokenizer(
    folder: Path, config: Mapping[str, Any], specials: Mapping[str, str], generation_ends: tuple[int, ...]
) -> TextTokenizer:  # fmt: skip
    model = read_tokenizer(folder / _MODEL) if (folder / _MODEL).is_file() else _from_vocabulary(folder, config)
    end = specials.get("eos_token", "")
    if not end and generation_ends:
        end = model.id_to_token(generation_ends[0]) or ""
    if not end:
        end = find_end_token(model, "", folder / _MODEL)
    named = dict.fromkeys([*([begin] if (begin := specials.get("bos_token")) else []), end])
    model.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in named])
    ends = dict.fromkeys((*generation_ends, model.get_vocab()[end]))
    return wrap_tokenizer(model, end, _begin_ids(folder, model, config, specials), tuple(ends))


def _begin_ids(
    folder: Path, model: tokenizers.Tokenizer, config: Mapping[str, Any], specials: Mapping[str, str]
) -> tuple[int, ...]:  # fmt: skip
    """What transformers puts in front of a text: what tokenizer.json says; its configuration where there is none."""
    if (folder / _MODEL).is_file():
        whole, plain = (model.encode("a", add_special_tokens=marked).ids for marked in (True, False))
        front = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
        return tuple(whole[:front])
    begin = model.token_to_id(specials.get("bos_token", ""))
    return () if begin is None or not config.get("add_bos_token") else (begin,)


def _from_vocabulary(folder: Path, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """GPT-2's byte-level BPE from vocab.json and merges.txt."""
    kind = config.get("tokenizer_class", "GPT2Tokenizer").removesuffix("Fast")
    paths = [folder / "vocab.json", folder / "merges.txt"]
    if kind != "GPT2Tokenizer" or not all(path.is_file() for path in paths):
        raise UserError(
            "model", str(folder), f"a folder with {_MODEL}",
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) of transformers makes one.",
        )  # fmt: skip
    try:
        model = tokenizers.Tokenizer(models.BPE.from_file(*map(str, paths)))
    except Exception as error:  # The library raises bare Exception for whatever it cannot read.
        raise UserError("model", str(folder), f"vocab.json and merges.txt of a GPT-2 tokenizer ({error})") from error
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(config.get("add_prefix_space")))
    model.decoder = decoders.ByteLevel()
    return model


def _byte_vocabulary(tokenizer: TextTokenizer) -> TextTokenizer:
    """The tokenizer of bytes in the terms of tokenizer.json."""
    # GPT-2 writes printable bytes as themselves and the others, in order, as the characters from 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    names = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    model = tokenizers.Tokenizer(models.BPE({name: byte for byte, name in names.items()}, []))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    return wrap_tokenizer(model, "<|endoftext|>", tokenizer.begin_ids, tokenizer.end_ids)


def _specials(config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token`, `eos_token`, ...: given as texts, or as records of a token."""
    named = {key: value for key, value in config.items() if key.endswith("_token")}
    texts = {key: value.get("content") if isinstance(value, dict) else value for key, value in named.items()}
    return {key: text for key, text in texts.items() if isinstance(text, str)}


def _chat_source(folder: Path, config: Mapping[str, Any]) -> str:
    path = folder / _CHAT
    if path.is_file():
        return path.read_text(encoding="utf-8")
    stated = config.get("chat_template") or ""
    if isinstance(stated, str):
        return stated
    whole = isinstance(stated, list) and all(isinstance(entry, dict) and "template" in entry for entry in stated)
    check(whole, "chat_template", str(folder / _CONFIG), "a text, or a list of {name, template}")
    templates = {entry.get("name"): entry["template"] for entry in stated}
    return templates.get("default", next(iter(templates.values()), ""))


def _ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)


def _sampling(generation: Mapping[str, Any]) -> SamplingConfig | None:
    known = {field.name for field in fields(SamplingConfig)}
    stated = {name: generation[name] for name in _SAMPLING if name in known and generation.get(name) is not None}
    if not generation.get("do_sample"):
        # transformers takes the most probable token unless it is told to sample.
        stated = {name: value for name, value in stated.items() if name == "repetition_penalty"}
        return SamplingConfig(temperature=0.0, **stated) if stated or "do_sample" in generation else None
    return SamplingConfig(**stated)


def _generation(tokenizer: TextTokenizer, sampling: SamplingConfig | None) -> dict[str, Any]:
    ends = list(tokenizer.end_ids)
    stated: dict[str, Any] = {"eos_token_id": ends if len(ends) > 1 else ends[0]}
    if tokenizer.begin_ids:
        stated["bos_token_id"] = tokenizer.begin_ids[0]
    if sampling:
        filters = {name: getattr(sampling, name) for name in _SAMPLING if hasattr(sampling, name)}
        greedy = sampling.temperature == 0
        kept = {name: value for name, value in filters.items() if not greedy or name == "repetition_penalty"}
        stated |= {"do_sample": not greedy, **kept}
    return stated


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError("model", str(path), f"a file of JSON ({error})") from error
    check(isinstance(value, dict), "model", str(path), f"a JSON object, not {type(value).__name__}")
    return value


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False), encoding="utf-8")
