"""Text to token ids and back: bytes, a Hugging Face `tokenizer.json`, or BPE trained on the run's text."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from lmlab.core.errors import UserError
from lmlab.data.config import Bytes, Tokenizer, TokenizerFile, TrainedBPE
from lmlab.data.folders import build_once
from lmlab.data.progress import say
from lmlab.data.sources import Document
from lmlab.data.spellings import spellings

END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<|im_end|>", "[SEP]", "[EOS]")
"""Names that published tokenizers give to the token that ends a text, the usual ones first."""
RECORD = "text_tokenizer.json"
"""The file that says how a saved tokenizer is used."""
_MODEL = "tokenizer.json"


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer as pure functions; text that spells a special token is encoded as plain text."""

    vocab_size: int
    """V."""
    end_id: int
    """The token before and after every document that a model is pre-trained on."""
    begin_ids: tuple[int, ...]
    """What comes before a text that a model is to continue or to score."""
    end_ids: tuple[int, ...]
    """Tokens each of which ends what a model writes."""
    encode_batch: Callable[[Sequence[str]], list[np.ndarray]]
    """Texts to int32 ids, without markers; runs on all cores where the library does."""
    encode_marked: Callable[[str], tuple[np.ndarray, np.ndarray]]
    """A text in which special tokens are spelled out (a rendered chat) to those tokens and the rest: int32 ids [T], and
    [T, 2] the characters of the text that each stands for, from and to."""
    decode: Callable[[Iterable[int]], str]
    """Ids to text: special tokens vanish, bytes that are not UTF-8 become U+FFFD."""
    spellings_V: tuple[bytes, ...]
    """The bytes that each token stands for in the middle of a text; b"" for special tokens."""
    fingerprint: str
    """Hash of all that decides how text is encoded."""
    save: Callable[[Path], None]
    """Write what `load_tokenizer` needs into a folder."""

    @cached_property
    def token_bytes_V(self) -> np.ndarray:  # noqa: N802 (a field to its readers)
        """float32, how many bytes of text each token stands for; 0 for special tokens."""
        return np.asarray([len(spelling) for spelling in self.spellings_V], np.float32)


def build_tokenizer(
    config: Tokenizer, train_documents: Callable[[], Iterator[Document]], cache_dir: Path,
    train_fingerprint: str,
) -> TextTokenizer:  # fmt: skip
    """The tokenizer that `config` describes; BPE is trained once for each training text and then cached.

    Args:
        config: which tokenizer.
        train_documents: starts a pass over the training documents; called only to train BPE.
        cache_dir: where trained vocabularies are kept.
        train_fingerprint: hash of the training documents.

    Raises:
        UserError: the file is missing or not a tokenizer, or has no token to end documents with.
    """
    match config:
        case Bytes():
            return byte_tokenizer()
        case TokenizerFile():
            return _from_file(Path(config.path).expanduser(), config.end_token)
        case TrainedBPE():
            path = _trained_bpe(config, train_documents, cache_dir, train_fingerprint)
            return _from_file(path, END_TOKENS[0])


def load_tokenizer(folder: Path) -> TextTokenizer:
    """The tokenizer that `TextTokenizer.save` wrote into `folder`.

    Raises:
        UserError: nothing was saved there.
    """
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UserError("tokenizer", str(folder), f"a folder with a saved tokenizer ({RECORD})") from error
    if record["kind"] == "bytes":
        return byte_tokenizer()
    # Records of the first runs do not have them.
    begin_ids, end_ids = (tuple(record[name]) if name in record else None for name in ("begin_ids", "end_ids"))
    return wrap_tokenizer(read_tokenizer(folder / _MODEL), record["end_token"], begin_ids, end_ids)


def byte_tokenizer() -> TextTokenizer:
    """UTF-8 bytes as ids 0 to 255; 256 ends a document. It has no special tokens that a text could spell."""

    def encode_batch(texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

    def encode_marked(text: str) -> tuple[np.ndarray, np.ndarray]:
        starts = np.repeat(np.arange(len(text)), [len(letter.encode()) for letter in text])
        return encode_batch([text])[0], np.stack([starts, starts + 1], axis=1)

    def decode(ids: Iterable[int]) -> str:
        return bytes(int(i) for i in ids if i < 256).decode(errors="replace")

    def save(folder: Path) -> None:
        (folder / RECORD).write_text(json.dumps({"kind": "bytes"}), encoding="utf-8")

    spelled = (*(bytes([byte]) for byte in range(256)), b"")
    return TextTokenizer(
        257, 256, (256,), (256,), encode_batch, encode_marked, decode, spelled, "bytes-1", save
    )  # fmt: skip


def wrap_tokenizer(
    model: tokenizers.Tokenizer, end_token: str, begin_ids: tuple[int, ...] | None = None,
    end_ids: tuple[int, ...] | None = None,
) -> TextTokenizer:  # fmt: skip
    """A tokenizer of the library as a `TextTokenizer`.

    end_token: ends a document; it must be in the vocabulary. begin_ids, end_ids: see there; default: the end token.

    The library finds the names of special tokens in the text itself unless `encode_special_tokens` is set,
    and never those of tokens that are added but not special; the end token is therefore made special first.
    """
    model.add_special_tokens([tokenizers.AddedToken(end_token, special=True, normalized=False)])
    model.no_truncation()
    model.no_padding()
    end_id = model.get_vocab(with_added_tokens=True)[end_token]
    begin, ends = (end_id,) if begin_ids is None else begin_ids, end_ids or (end_id,)
    # The file says alone what texts begin with. The post-processor of its maker may also trim the places of tokens.
    serialised = json.dumps(
        json.loads(model.to_str()) | {"post_processor": _beginning(model, begin)}, ensure_ascii=False
    )
    marked = tokenizers.Tokenizer.from_str(serialised)
    model.encode_special_tokens = True

    def encode_batch(texts: Sequence[str]) -> list[np.ndarray]:
        encodings = model.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, np.int32) for encoding in encodings]

    def encode_marked(text: str) -> tuple[np.ndarray, np.ndarray]:
        encoding = marked.encode(text, add_special_tokens=False)
        return np.asarray(encoding.ids, np.int32), np.asarray(encoding.offsets, np.int64).reshape(-1, 2)

    def decode(ids: Iterable[int]) -> str:
        return model.decode([int(i) for i in ids], skip_special_tokens=True)

    record = {"kind": "tokenizer.json", "end_token": end_token, "begin_ids": begin, "end_ids": ends}

    def save(folder: Path) -> None:
        (folder / _MODEL).write_text(serialised, encoding="utf-8")
        (folder / RECORD).write_text(json.dumps(record), encoding="utf-8")

    vocab_size = max(model.get_vocab(with_added_tokens=True).values()) + 1
    fingerprint = hashlib.blake2b(f"{end_token}\n{serialised}".encode(), digest_size=16).hexdigest()
    return TextTokenizer(
        vocab_size, end_id, begin, ends, encode_batch, encode_marked, decode, spellings(model, vocab_size),
        fingerprint, save,
    )  # fmt: skip


def _beginning(model: tokenizers.Tokenizer, begin_ids: tuple[int, ...]) -> dict[str, Any] | None:
    """The post-processor that puts these tokens in front of a text, as tokenizer.json writes it."""
    if not begin_ids:
        return None
    tokens = [model.id_to_token(i) for i in begin_ids]
    front = [{"SpecialToken": {"id": token, "type_id": 0}} for token in tokens]
    text, other = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    known = {t: {"id": t, "ids": [i], "tokens": [t]} for t, i in zip(tokens, begin_ids, strict=True)}
    single = [*front, text]
    return {"type": "TemplateProcessing", "single": single, "pair": [*single, other], "special_tokens": known}


def _from_file(path: Path, end_token: str) -> TextTokenizer:
    model = read_tokenizer(path)
    return wrap_tokenizer(model, find_end_token(model, end_token, path))


def read_tokenizer(path: Path) -> tokenizers.Tokenizer:
    """A tokenizer.json as the library has it. Raises `UserError`: there is none, or it is something else."""
    if not path.is_file():
        raise UserError("data.tokenizer.path", str(path), "an existing tokenizer.json", "Check the path.")
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # The library raises bare Exception for whatever it cannot read.
        raise UserError(
            "data.tokenizer.path", str(path), f"a Hugging Face tokenizer.json ({error})",
            "A slow tokenizer (vocab.json and merges.txt) is converted by transformers' save_pretrained.",
        ) from error  # fmt: skip


def find_end_token(model: tokenizers.Tokenizer, wanted: str, path: Path) -> str:
    """`wanted`, or if it is empty the first usual name, if the vocabulary holds it. Raises `UserError`: none."""
    for name in (wanted,) if wanted else END_TOKENS:
        if model.token_to_id(name) is not None:
            return name
    special = sorted(t.content for t in model.get_added_tokens_decoder().values() if t.special)
    raise UserError(
        "data.tokenizer.end_token", wanted, f"a token of {path}",
        f"Its special tokens: {', '.join(special[:20]) or 'none'}. The usual names: {', '.join(END_TOKENS)}.",
    )  # fmt: skip


def _trained_bpe(
    config: TrainedBPE, train_documents: Callable[[], Iterator[Document]], cache_dir: Path, fingerprint: str
) -> Path:  # fmt: skip
    key = json.dumps([asdict(config), fingerprint, tokenizers.__version__])
    name = f"bpe-{config.vocab_size}-{hashlib.blake2b(key.encode(), digest_size=8).hexdigest()}"

    def build(folder: Path) -> None:
        say(f"training a tokenizer of {config.vocab_size:,} tokens")
        _train_bpe(config, train_documents()).save(str(folder / _MODEL))

    return build_once(cache_dir / name, lambda folder: (folder / _MODEL).is_file(), build) / _MODEL


def _train_bpe(config: TrainedBPE, documents: Iterator[Document]) -> tokenizers.Tokenizer:
    from tokenizers import decoders, models, pre_tokenizers, trainers

    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size, special_tokens=[END_TOKENS[0]], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    model.train_from_iterator(_first_bytes(documents, config.train_bytes), trainer)
    return model


def _first_bytes(documents: Iterator[Document], limit: int) -> Iterator[str]:
    read = 0
    for document in documents:
        text = document.text.encode()[: limit - read].decode(errors="ignore")
        read += len(text.encode())
        yield text
        if read >= limit or len(text) < len(document.text):
            return
