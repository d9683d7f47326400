"""Tokenizers from bare vocabularies, as GGUF and llama2.c files hold them."""

from collections.abc import Sequence
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from lmlab.core.errors import check

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(digits: str) -> list[Any]:
    words = pre_tokenizers.Split(Regex(_WORDS % digits), behavior="isolated")
    return [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]


_GPT2: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
_SINGLE_DIGITS = [pre_tokenizers.Digits(individual_digits=True), *_GPT2]
_SPLITS = {
    "default": _GPT2, "gpt-2": _GPT2, "smollm": _SINGLE_DIGITS, "starcoder": _SINGLE_DIGITS, "qwen2": _split(""),
    "llama-bpe": _split("{1,3}"),
}  # fmt: skip
"""How text is cut into words, by the names that llama.cpp gives (`tokenizer.ggml.pre`)."""


def byte_level(
    tokens: Sequence[str], merges: Sequence[str], split: str, added: Sequence[AddedToken]
) -> tokenizers.Tokenizer:  # fmt: skip
    """Byte-level BPE. merges: pairs with a blank between, the first to be made first; added: tokens with rules.

    Raises:
        UserError: a way to split that is not known.
    """
    check(split in _SPLITS, "tokenizer.ggml.pre", split, f"one of {', '.join(_SPLITS)}")
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    model = tokenizers.Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=split == "llama-bpe"))
    if split == "qwen2":
        model.normalizer = normalizers.NFC()
    model.pre_tokenizer = pre_tokenizers.Sequence(_SPLITS[split])
    model.decoder = decoders.ByteLevel()
    model.add_tokens(list(added))
    return model


def byte_fallback(
    pieces: Sequence[str], scores: Sequence[float], plain: Sequence[bool], added: Sequence[AddedToken], unknown: str,
    *, space_first: bool = True,
) -> tokenizers.Tokenizer:  # fmt: skip
    """The BPE of SentencePiece: of all neighbours that make up a piece, those of the best score are merged first.

    Args:
        pieces: the vocabulary, with ▁ for the blank and <0xNN> for the bytes.
        scores: of each piece.
        plain: whether text may be cut into the piece; bytes and markers are no such pieces.
        added: markers, with rules.
        unknown: the piece for what no other covers.
        space_first: put a blank before a text.
    """
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    known = {piece: score for piece, score, fine in zip(pieces, scores, plain, strict=True) if fine}
    pairs = [
        (-score, piece[:cut], piece[cut:])
        for piece, score in known.items()
        for cut in range(1, len(piece))
        if piece[:cut] in known and piece[cut:] in known
    ]
    merges = [(left, right) for _, left, right in sorted(pairs, key=lambda pair: pair[0])]
    model = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, unk_token=unknown, byte_fallback=True, fuse_unk=True)
    )  # fmt: skip
    blanks: list[Any] = [normalizers.Replace(" ", "▁")]
    parts: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if space_first:
        blanks.insert(0, normalizers.Prepend("▁"))
        parts.append(decoders.Strip(" ", 1, 0))
    model.normalizer = normalizers.Sequence(blanks)
    model.decoder = decoders.Sequence(parts)
    model.add_tokens(list(added))
    return model
