"""What each token of a vocabulary stands for, as bytes."""

import json

import tokenizers


def spellings(model: tokenizers.Tokenizer, vocab_size: int) -> tuple[bytes, ...]:
    """The bytes of each of V tokens in the middle of a text; b"" for special tokens and numbers that no token has.

    Exact for byte-level and byte-fallback vocabularies, in which tokens need not be whole characters. Where a
    vocabulary normalises text or drops spaces (WordPiece) they are only near what the text says.
    """
    added = model.get_added_tokens_decoder()
    settings = json.loads(model.to_str())
    parts = json.dumps([settings.get("pre_tokenizer"), settings.get("decoder")])
    pieces = _spell_wordpiece if settings["model"].get("type") == "WordPiece" else _spell_sentencepiece
    spell = _spell_byte_level if '"ByteLevel"' in parts else pieces
    spelled = [b""] * vocab_size
    for token, i in model.get_vocab(with_added_tokens=True).items():
        if i not in added:
            spelled[i] = spell(token)
        elif not added[i].special:
            spelled[i] = token.encode()
    return tuple(spelled)


def _byte_letters() -> dict[str, bytes]:
    """The printable character that byte-level vocabularies write for each byte, as GPT-2 has chosen them."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): bytes([byte]) for byte in printable}
    return letters | {chr(256 + i): bytes([byte]) for i, byte in enumerate(others)}


_BYTES = _byte_letters()


def _spell_byte_level(token: str) -> bytes:
    return b"".join(_BYTES.get(letter) or letter.encode() for letter in token)


def _spell_sentencepiece(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes.fromhex(token[3:5])
    return token.replace("▁", " ").encode()


def _spell_wordpiece(token: str) -> bytes:
    return token.removeprefix("##").encode()
