"""Features of answers, [N, 2, D] float32: hashed words, or the states of a frozen model."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmlab.core.errors import check
from lmlab.core.types import AnswerBatch, Array, Params
from lmlab.data.answers import lay_out_pairs, preferences_of
from lmlab.data.pair_records import Pair
from lmlab.data.pairs_config import PairsConfig
from lmlab.data.preferences import encode_pairs
from lmlab.data.progress import advancing
from lmlab.interop.pretrained import Pretrained, tokenizer_of
from lmlab.label_noise.config import LabelNoise
from lmlab.label_noise.read import answers_of
from lmlab.loading import load_model
from lmlab.models.lm import LM
from lmlab.objectives.logprobs import answer_lengths, read_answers
from lmlab.retrieval.config import HashTfidf
from lmlab.retrieval.tfidf import hash_tfidf

_TEXTS, _ROWS = 512, 8
"""Texts that are hashed at once; rows of a batch of a model."""


def read_features(pairs: list[Pair], args: LabelNoise) -> np.ndarray:
    """Of the chosen and the rejected answer of each pair, each coordinate of about the size 1."""
    if args.model:
        return model_features(pairs, load_model(Path(args.model)), args.length)
    return word_features(pairs, args.dimensions)


def word_features(pairs: list[Pair], dimensions: int) -> np.ndarray:
    """Tf-idf of words and pairs of words of the answers; what both answers share cancels in a linear head."""
    texts = list(answers_of(pairs))
    parts = [texts[start : start + _TEXTS] for start in range(0, len(texts), _TEXTS)]
    encode = hash_tfidf(HashTfidf(dimensions)).fit(parts)
    vectors_ND = np.zeros((len(texts), dimensions), np.float32)
    with advancing("reading answers", len(texts), "answers") as tell:
        for number, part in enumerate(parts):
            vectors_ND[number * _TEXTS : number * _TEXTS + len(part)] = encode(part)
            tell(min(len(texts), (number + 1) * _TEXTS))
    return vectors_ND.reshape(-1, 2, dimensions) * np.sqrt(dimensions, dtype=np.float32)


def model_features(pairs: list[Pair], model: Pretrained, length: int) -> np.ndarray:
    """State of the last token of each answer, and the mean over its tokens, standardised over all answers.

    Raises:
        UserError: the model has no tokenizer; an answer of which nothing is left in `length` tokens.
    """
    template = None if model.text is None else model.text.chat
    config = PairsConfig("DATA", length=min(length, model.lm.max_length), too_long="truncate")
    encoded, _ = encode_pairs(_records(pairs, template is None), config, tokenizer_of(model), template)
    check(len(encoded) == len(pairs), "--length", length, "room for the tokens in which two answers differ",
          f"{len(pairs) - len(encoded)} pairs are alike in so many.")  # fmt: skip
    rows = lay_out_pairs(encoded, config.length)
    states_NF = np.zeros((len(pairs), 2, 2 * model.config.width), np.float32)
    with advancing("reading answers", len(pairs), "pairs") as tell:
        for start in range(0, rows.rows, _ROWS):
            numbers = range(start, min(start + _ROWS, rows.rows))
            answers = jax.tree.map(jnp.asarray, preferences_of(rows, numbers, _ROWS).answers)
            made_BSF = np.asarray(answer_states(model.lm, model.params, answers))
            for b, number in enumerate(numbers):
                held = rows.pairs_of(number)
                states_NF[held] = made_BSF[b].reshape(-1, 2, made_BSF.shape[-1])[: len(held)]
            tell(int(rows.row_starts[numbers[-1] + 1]))
    flat_NF = states_NF.reshape(-1, states_NF.shape[-1])
    spread_F = flat_NF.std(axis=0)
    return (states_NF - flat_NF.mean(axis=0)) / np.where(spread_F > 0, spread_F, 1)


def _records(pairs: list[Pair], plain: bool) -> Any:
    """Records to tokenise; for a model without a chat template the messages of a prompt become a text."""
    for pair in pairs:
        prompt = pair.prompt
        if plain and not isinstance(prompt, str):
            prompt = "".join(f"{message['role']}: {message['content']}\n\n" for message in prompt)
        elif not isinstance(prompt, str):
            prompt = list(prompt)  # type: ignore[assignment]
        yield pair.where, {"prompt": prompt, "chosen": pair.chosen, "rejected": pair.rejected}


@partial(jax.jit, static_argnums=0)
def answer_states(lm: LM, params: Params, answers: AnswerBatch) -> Array:
    """[B, S, 2 D]: the state of each answer's last token, and the mean of the states of its tokens."""
    hidden_BTD = read_answers(lm, params, answers).astype(jnp.float32)
    last_BSD = jnp.take_along_axis(hidden_BTD, answers.ends_BS[..., None], axis=1)
    # The tokens of an answer stand together and end there.
    back_BST = answers.ends_BS[..., None] - jnp.arange(hidden_BTD.shape[1])[None, None]
    lengths_BS1 = answer_lengths(answers)[..., None]
    members_BST = (back_BST >= 0) & (back_BST < lengths_BS1)
    mean_BSD = members_BST.astype(jnp.float32) @ hidden_BTD / jnp.maximum(lengths_BS1, 1)
    return jnp.concatenate([last_BSD, mean_BSD], axis=-1)
