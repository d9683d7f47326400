"""Planted flips in real pairs, and how strength goes with the agreement of people, by heads on hashed words."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.results import say
from experiments.reward_pilot import LEAST_RATE
from lmlab.core.errors import check
from lmlab.data.config import Files
from lmlab.data.files import read_records
from lmlab.data.pair_records import Pair
from lmlab.evals.ranking import auc
from lmlab.label_noise.config import LabelNoise
from lmlab.label_noise.features import word_features
from lmlab.label_noise.read import Found, group_pairs, read_file
from lmlab.label_noise.scores import cross_fitted, head_differences, make_head, train_heads
from lmlab.objectives import treatments as cure
from lmlab.objectives.strength import fit_noise, noise_rate
from lmlab.objectives.treatments import Treatment

FLIPS, MODELS, FIFTHS, LEAST = 0.2, 5, 5, 40
"""Planted flips; models of an arm; parts by strength; prompts that are enough for folds, and for some flips."""


@dataclass(frozen=True)
class Votes:
    """Pairs that the first of three people ordered."""

    pairs: list[Pair]
    agreement_N: np.ndarray
    """The share of the other two who agree; a tie is half."""


def read_split(path: str) -> Found:
    """Pairs with a field "split". Raises `UserError`: too few to train on, none to test."""
    found = read_file(Path(path), "drop")
    train = [pair for pair, record in zip(found.pairs, found.records, strict=True) if record.get("split") != "test"]
    check(len(train) < len(found.pairs), "--pairs", path, 'some pairs with "split": "test"')
    prompts = int(group_pairs(train).max()) + 1 if train else 0
    check(prompts >= LEAST, "--pairs", path, f"pairs of at least {LEAST} prompts to train on", f"There are {prompts}.")
    return found


def read_votes(path: str) -> Votes:
    """Answers with three votes; what is a tie to the first is left out. Raises `UserError`: another shape, too few.

    A file as of PandaLM: instruction, response1, response2, annotator1 to annotator3; a vote is 0 (tie), 1 or 2.
    """
    pairs, agreement = [], []
    for where, record in read_records(Files(path), [(Path(path).name, Path(path))]):
        needed = ("instruction", "response1", "response2", "annotator1", "annotator2", "annotator3")
        whole = isinstance(record, dict) and set(needed) <= record.keys()
        check(whole, "--votes", where, f"a record with {', '.join(needed)}")
        assert isinstance(record, dict)
        votes = [record[name] for name in needed[3:]]
        check(all(str(vote) in ("0", "1", "2") for vote in votes), "--votes", where, "votes of 0, 1 or 2")
        first, *others = map(int, votes)
        if first:
            # One answer is the JSON value false.
            answers = [str(record[name]) for name in ("response1", "response2")]
            chosen, rejected = answers if first == 1 else answers[::-1]
            pairs.append(Pair(where, str(record["instruction"]), chosen, rejected))
            agreement.append(np.mean([0.5 if vote == 0 else float(vote == first) for vote in others]))
    agreement_N = np.asarray(agreement)
    prompts = int(group_pairs(pairs).max()) + 1 if pairs else 0
    check(prompts >= LEAST, "--votes", path, f"votes on at least {LEAST} prompts", f"There are {prompts}.")
    check(0 < np.sum(agreement_N < 0.5) < len(pairs), "--votes", path, "people who sometimes agree, and sometimes not")
    return Votes(pairs, agreement_N)


def run_pairs(found: Found, seeds: int) -> dict[str, Any]:
    """Of pairs with a field "split": flips found in the training part, accuracy of each arm on the other."""
    args = LabelNoise("")
    features = word_features(found.pairs, args.dimensions)
    test_N = np.asarray([record.get("split") == "test" for record in found.records])
    groups_N = group_pairs([pair for pair, test in zip(found.pairs, test_N, strict=True) if not test])
    say(f"real pairs: {np.sum(~test_N):,} to train on, {np.sum(test_N):,} to test")
    result = [_one_seed(features[~test_N], groups_N, features[test_N], args, seed) for seed in range(seeds)]
    return {"train": int(np.sum(~test_N)), "test": int(np.sum(test_N)), "seeds": result}


def _one_seed(
    features: np.ndarray, groups_N: np.ndarray, tests: np.ndarray, args: LabelNoise, seed: int
) -> dict[str, Any]:  # fmt: skip
    rng = np.random.default_rng(seed)
    flips_N = rng.random(len(features)) < FLIPS
    none_N = np.zeros(len(features), bool)
    given, planted = cross_fitted(features, np.stack([none_N, flips_N]), groups_N, args, rng)
    mu = jnp.asarray(planted.mean(axis=0))
    found: dict[str, Any] = {
        "auc": auc(-planted.mean(axis=0), flips_N), "agreement, as given": float(np.mean(given.mean(axis=0) > 0))
    }  # fmt: skip
    for name, strength in {"as given": jnp.asarray(given.mean(axis=0)), "planted": mu}.items():
        found[f"noise rate, {name}"] = float(fit_noise(strength)[1])
        found[f"by confident learning, {name}"] = float(noise_rate(jax.nn.sigmoid(strength)))
    treated = arms(mu, jnp.asarray(flips_N))
    flipped = [cure.with_flips(treatment, jnp.asarray(flips_N)) for treatment in treated.values()]
    stacked = Treatment(*(jnp.repeat(jnp.stack(part), MODELS, axis=0) for part in zip(*flipped, strict=True)))
    head = make_head(args.head, features.shape[-1])
    everything = np.ones(stacked.targets_N.shape, bool)
    params = train_heads(head, features, stacked, everything, args, rng)
    right = np.mean(np.asarray(head_differences(head, params, jnp.asarray(tests))) > 0, axis=1)
    return found | {"accuracy": dict(zip(treated, right.reshape(-1, MODELS).mean(axis=1).tolist(), strict=True))}


def arms(mu: jax.Array, flips_N: jax.Array) -> dict[str, Treatment]:
    """Treatments of labels some of which were flipped on purpose."""
    scale, fitted = fit_noise(mu)
    known, _ = fit_noise(mu, [FLIPS])
    return {
        "nothing": cure.as_given(mu),
        "without the planted flips": cure.flip(mu, flips_N),
        "flip lowest 20 %": cure.flip(mu, cure.lowest(mu, FLIPS)),
        "flip lowest, estimated rate": cure.flip(mu, cure.lowest(mu, float(fitted))),
        "drop lowest 20 %": cure.drop(mu, cure.lowest(mu, FLIPS)),
        "posterior": cure.posterior(mu, jnp.maximum(fitted, LEAST_RATE), scale),
        "posterior, 20 %": cure.posterior(mu, FLIPS, known),
    }


def run_votes(votes: Votes, seeds: int) -> list[dict[str, Any]]:
    """How often the other two people agree with the first, by fifth of the strength of the first one's label."""
    agreement_N = votes.agreement_N
    say(f"votes: {len(votes.pairs):,} pairs, others agree with {agreement_N.mean():.1%}")
    args = LabelNoise("")
    features, groups_N = word_features(votes.pairs, args.dimensions), group_pairs(votes.pairs)
    result = []
    for seed in range(seeds):
        none_1N = np.zeros((1, len(votes.pairs)), bool)
        scores = cross_fitted(features, none_1N, groups_N, args, np.random.default_rng(seed))
        mean_N = scores[0].mean(axis=0)
        fifths = np.array_split(np.argsort(mean_N), FIFTHS)
        result.append({
            "agreement": [float(agreement_N[fifth].mean()) for fifth in fifths],
            "out of fold": float(np.mean(mean_N > 0)), "auc of dissent": auc(-mean_N, agreement_N < 0.5),
        })  # fmt: skip
    return result
