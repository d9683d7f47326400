"""Real pairs: a small model learns to write the dialogues, then which of two answers was preferred."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.preferences_language import train
from experiments.results import say
from lmlab.core.errors import UserError, check
from lmlab.core.types import Array, Objective, Params, Preferences, TokenBatch
from lmlab.data.answers import PairRows, lay_out_pairs, preferences_of
from lmlab.data.config import TrainedBPE
from lmlab.data.files import is_heldout, read_records, split_files
from lmlab.data.folders import cache_root
from lmlab.data.packing import lay_out, row_at, stack_rows
from lmlab.data.pair_records import prompt_key, read_pair
from lmlab.data.pairs_config import PairsConfig
from lmlab.data.preferences import EncodedPair, encode_pairs
from lmlab.data.sources import Document
from lmlab.data.tokenizers import TextTokenizer, build_tokenizer
from lmlab.inference.config import SamplingConfig
from lmlab.inference.sample import sample
from lmlab.inference.score import score
from lmlab.models.config import AttentionConfig, MLPConfig, TransformerConfig
from lmlab.models.lm import LM
from lmlab.models.transformer import transformer
from lmlab.objectives import pair_losses
from lmlab.objectives.dpo import dpo
from lmlab.objectives.next_token import next_token
from lmlab.reference import with_reference

LENGTH, ROWS = 384, 4
BETAS = (0.03, 0.1, 0.3, 1.0)
PROMPTS, NEW_TOKENS = 128, 48
"""Answers that the divergence is measured on, and how long they may be."""


@dataclass(frozen=True)
class RealSizes:
    """How much is trained."""

    seeds: int
    vocabulary: int
    language_steps: int
    steps: int
    rate: float


def read(path: str, vocabulary: int) -> tuple[TextTokenizer, list[EncodedPair], list[EncodedPair]]:
    """A tokenizer of the dialogues, and the pairs to train on and to measure with.

    The split is that of the file (field "split"), or else a tenth of the prompts by hash.
    """
    config = PairsConfig(path, invalid="drop", length=LENGTH)
    records = list(read_records(config.files(), split_files(config.files(), "train")))
    held = lambda record: (record.get("split") == "test" if isinstance(record, dict) and "split" in record
                           else is_heldout(prompt_key(record), 10))  # fmt: skip
    texts = [text for _, record in records if not held(record) for text in whole_text(record)]
    documents = (Document(str(i), text) for i, text in enumerate(texts))
    tokenizer = build_tokenizer(TrainedBPE(vocabulary), lambda: documents, cache_root(""), f"{path} {len(texts)}")
    train_pairs, held_pairs = (
        encode_pairs([(where, record) for where, record in records if held(record) == wanted], config, tokenizer, None,
                     label="held-out pairs" if wanted else "pairs")[0] for wanted in (False, True)
    )  # fmt: skip
    return tokenizer, train_pairs, held_pairs


def whole_text(record: object) -> list[str]:
    """Prompt and preferred answer of a pair as one text; nothing of what is no pair."""
    try:
        pair = read_pair(record, "")
    except UserError:
        return []
    check(isinstance(pair.prompt, str), "--pairs", "chats", "pairs whose prompts are texts, for a model without turns")
    return [f"{pair.prompt}{pair.chosen}"]


def run_real(path: str, sizes: RealSizes) -> dict[str, Any]:
    """Held-out accuracy of the implicit reward, and divergence from the reference, by arm and seed."""
    tokenizer, pairs, held_pairs = read(path, sizes.vocabulary)
    lm = transformer(TransformerConfig(
        vocab_size=tokenizer.vocab_size, layers=3, width=128, max_length=2 * LENGTH, attention=AttentionConfig(heads=4),
        mlp=MLPConfig(width=344),
    ))  # fmt: skip
    say(f"a model of {tokenizer.vocab_size} tokens learns the dialogues")
    start = jax.jit(jax.vmap(lm.init))(jax.random.split(jax.random.key(0), sizes.seeds))
    reference = train(next_token(lm), lm, start, dialogues(pairs, sizes), sizes.language_steps, 2e-3)
    rows, held = lay_out_pairs(pairs, LENGTH), lay_out_pairs(held_pairs, LENGTH)
    found: dict[str, Any] = {"pairs": len(pairs), "held out": len(held_pairs), "arms": {}}
    arms = {f"DPO {beta}": (beta, False) for beta in BETAS} | {"DPO 0.1, labels shuffled": (0.1, True)}
    scored = {shuffled: per_seed(lm, reference, rows, sizes.seeds, shuffled) for shuffled in (False, True)}
    measured = per_seed(lm, reference, held, sizes.seeds, False)
    for name, (beta, shuffled) in arms.items():
        say(name)
        objective = dpo(lm, pair_losses.sigmoid, beta)
        params = train(objective, lm, reference, drawn(scored[shuffled]), sizes.steps, sizes.rate)
        values = evaluate(objective, params, measured)
        kl = [divergence(lm, of(params, s), of(reference, s), held_pairs, tokenizer) for s in range(sizes.seeds)]
        found["arms"][name] = values | {"kl": kl}
    return found


def of(params: Params, seed: int) -> Params:
    """The parameters of one seed."""
    return jax.tree.map(lambda x: x[seed], params)


def dialogues(pairs: Sequence[EncodedPair], sizes: RealSizes) -> Any:
    """`batches(i)`: rows of prompts with the preferred answer, [S, ROWS, T + 1]."""
    texts = [np.concatenate([pair.prompt, pair.answers[0]]) for pair in pairs]
    offsets = np.concatenate([[0], np.cumsum([len(text) for text in texts])])
    packed = lay_out(np.concatenate(texts), offsets, length=LENGTH, mode="whole")
    every = stack_rows([row_at(packed, i) for i in range(packed.rows)], packed.rows, LENGTH + 1)
    return drawn(jax.tree.map(lambda x: jnp.broadcast_to(jnp.asarray(x)[None], (sizes.seeds, *x.shape)), every))


def drawn(data: TokenBatch | Preferences) -> Any:
    """`batches(i)`: `ROWS` rows of each seed's own data [S, N, ...], drawn anew for every seed and step."""
    seeds, count = jax.tree.leaves(data)[0].shape[:2]

    def batches(i: Array) -> Any:
        chosen = jax.random.randint(jax.random.fold_in(jax.random.key(5), i), (seeds, ROWS), 0, count)
        return jax.vmap(lambda part, rows: jax.tree.map(lambda x: x[rows], part))(data, chosen)

    return batches


def per_seed(lm: LM, reference: Params, rows: PairRows, seeds: int, shuffled: bool) -> Preferences:
    """All rows [S, N, ...] with the log-probabilities of each seed's reference; labels shuffled or not."""
    every = []
    for seed in range(seeds):
        scored = with_reference(rows, lm, of(reference, seed), batch_size=ROWS)
        batch = preferences_of(scored, range(scored.rows), scored.rows)
        if shuffled:
            turned = np.random.default_rng(seed).random(batch.weights_BP.shape) < 0.5
            batch = turn(batch, turned)
        every.append(batch)
    return jax.tree.map(lambda *x: jnp.stack(x), *every)


def turn(batch: Preferences, turned_BP: np.ndarray) -> Preferences:
    """The batch with the preference of some pairs turned round: their answers change numbers."""
    answers = np.asarray(batch.answers.answers_BA)
    pair_BA = np.maximum((answers - 1) // 2, 0)
    other_BA = np.where((answers - 1) % 2 == 0, answers + 1, answers - 1)
    numbers_BA = np.where((answers > 0) & np.take_along_axis(turned_BP, pair_BA, axis=1), other_BA, answers)
    swap = lambda x: np.where(np.repeat(turned_BP, 2, axis=1), x.reshape(len(x), -1, 2)[:, :, ::-1].reshape(x.shape), x)
    return batch.replace(  # type: ignore[attr-defined]
        answers=batch.answers.replace(answers_BA=numbers_BA.astype(np.int32), ends_BS=swap(batch.answers.ends_BS)),
        reference_BS=swap(batch.reference_BS),
    )  # fmt: skip


def evaluate(objective: Objective, params: Params, held: Preferences) -> dict[str, list[float]]:
    """Accuracy and margin on all held-out pairs, by seed."""
    sums = jax.jit(jax.vmap(lambda params, batch: objective(params, batch, jax.random.key(0)).metrics))(params, held)
    return {name: (sums[name].sum / sums[name].weight).tolist() for name in ("accuracy", "margin", "logprob/chosen")}


def divergence(
    lm: LM, params: Params, reference: Params, pairs: Sequence[EncodedPair], tokenizer: TextTokenizer
) -> float:  # fmt: skip
    """KL(policy || reference) of an answer of up to `NEW_TOKENS` tokens: the mean log-ratio of what the policy says."""
    prompts = [pair.prompt for pair in pairs[:PROMPTS]]
    config = SamplingConfig(temperature=1.0, max_new_tokens=NEW_TOKENS)
    said = sample(lm, params, prompts, jax.random.key(9), config, end_ids=tokenizer.end_ids)
    ends = np.asarray(tokenizer.end_ids[:1], np.int32)
    answers = [np.concatenate([one.tokens, ends]) if one.ended else one.tokens for one in said]
    texts = list(zip(prompts, answers, strict=True))
    ratios = [ours.total - theirs.total for ours, theirs in
              zip(score(lm, params, texts), score(lm, reference, texts), strict=True)]  # fmt: skip
    return float(np.mean(ratios))
