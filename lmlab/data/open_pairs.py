"""From a `PairsConfig` to rows of pairs and batches of them."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from lmlab.data.answers import PairRows, lay_out_pairs, pairs_once, pairs_stream
from lmlab.data.chat import ChatTemplate
from lmlab.data.files import file_records, is_heldout, read_records, split_files
from lmlab.data.open import Data
from lmlab.data.pair_records import prompt_key
from lmlab.data.pairs_config import PairsConfig
from lmlab.data.preferences import EncodedPair, encode_pairs
from lmlab.data.sources import Split
from lmlab.data.tokenizers import TextTokenizer


@dataclass(frozen=True)
class PairData:
    """Pairs of both splits in rows, and what was kept, cut and dropped."""

    train: PairRows
    heldout: PairRows
    summary: dict[str, int | str]
    """Counts and hashes, ready for JSON."""


def read_pairs(config: PairsConfig, tokenizer: TextTokenizer, template: ChatTemplate | None) -> PairData:
    """Read and tokenise the pairs of both splits.

    Where no files are held out, a share of the prompts is, by hash: pairs of one prompt stay together.

    Args:
        config: what to read, and how rows are made of it.
        tokenizer: of the model.
        template: how the model's chats are written; None: prompts are texts that answers follow.

    Raises:
        UserError: a line that is no pair (file and line are named), a template that fails, nothing to learn.
    """
    rows: dict[Split, PairRows] = {}
    summary: dict[str, int | str] = {"vocab_size": tokenizer.vocab_size, "tokenizer": tokenizer.fingerprint}
    splits: tuple[Split, ...] = ("train", "heldout")
    for split in splits:
        pairs, counts = encode_pairs(_records(config, split), config, tokenizer, template, label=split)
        rows[split] = lay_out_pairs(pairs, config.length, shared=config.layout == "shared")
        summary |= {f"pairs/{split}/{name}": count for name, count in counts.items()}
        summary[f"pairs/{split}/fingerprint"] = fingerprint(pairs)
    return PairData(rows["train"], rows["heldout"], summary)


def open_pairs(data: PairData, config: PairsConfig, tokenizer: TextTokenizer, *, host: int = 0, hosts: int = 1) -> Data:
    """All that a run reads. host, hosts: see `open_data`."""
    return Data(
        tokenizer=tokenizer,
        train=pairs_stream(data.train, config, host=host, hosts=hosts),
        heldout=partial(pairs_once, data.heldout, config, host=host, hosts=hosts),
        texts=lambda split: iter(()),
        caches={},
        orders={},
        summary=data.summary,
    )


def fingerprint(pairs: list[EncodedPair]) -> str:
    """Hash of the tokens, weights and margins of pairs."""
    digest = hashlib.blake2b(digest_size=10)
    for pair in pairs:
        for tokens in (pair.prompt, *pair.answers):
            digest.update(len(tokens).to_bytes(4, "little") + tokens.tobytes())
        digest.update(json.dumps([pair.weight, pair.margin, pair.target]).encode())
    return digest.hexdigest()


def _records(config: PairsConfig, split: Split) -> Iterator[tuple[str, object]]:
    if config.heldout:
        yield from file_records(config.files(), split)
        return
    for where, record in read_records(config.files(), split_files(config.files(), "train")):
        if is_heldout(prompt_key(record), config.heldout_percent) == (split == "heldout"):
            yield where, record
