"""Planted flips in real pairs, and how strength goes with the agreement of people, by heads on hashed words."""

import gzip
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.results import say
from experiments.reward_pilot import LEAST_RATE
from lmlab.data.pair_records import Pair
from lmlab.evals.ranking import auc
from lmlab.label_noise.config import LabelNoise
from lmlab.label_noise.features import word_features
from lmlab.label_noise.read import read_file
from lmlab.label_noise.scores import cross_fitted, head_differences, make_head, train_heads
from lmlab.objectives import treatments as cure
from lmlab.objectives.strength import fit_noise, noise_rate
from lmlab.objectives.treatments import Treatment

FLIPS, MODELS, FIFTHS = 0.2, 5, 5


def run_pairs(path: str, seeds: int) -> dict[str, Any]:
    """Of a file of pairs with a field "split": flips found in the training part, accuracy of each arm on the other."""
    found = read_file(Path(path), "drop")
    args = LabelNoise(path)
    features = word_features(found.pairs, args.dimensions)
    test_N = np.asarray([record.get("split") == "test" for record in found.records])
    say(f"real pairs: {np.sum(~test_N):,} to train on, {np.sum(test_N):,} to test")
    result = [_one_seed(features[~test_N], features[test_N], args, seed) for seed in range(seeds)]
    return {"train": int(np.sum(~test_N)), "test": int(np.sum(test_N)), "seeds": result}


def _one_seed(features: np.ndarray, tests: np.ndarray, args: LabelNoise, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    flips_N = rng.random(len(features)) < FLIPS
    none_N = np.zeros(len(features), bool)
    given, planted = cross_fitted(features, np.stack([none_N, flips_N]), args, rng)
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


def run_votes(path: str, seeds: int) -> list[dict[str, Any]]:
    """Of answers with three votes: how often the other two agree with the first, by fifth of the strength of its label.

    A file as of PandaLM: instruction, response1, response2, annotator1 to annotator3; a vote is 0 (tie), 1 or 2.
    """
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        records = [record for record in map(json.loads, lines) if int(record["annotator1"])]
    pairs, agreement = [], []
    for number, record in enumerate(records):
        first, *others = (int(record[f"annotator{i}"]) for i in (1, 2, 3))
        # One answer is the JSON value false.
        answers = [str(record[name]) for name in ("response1", "response2")]
        chosen, rejected = answers if first == 1 else answers[::-1]
        pairs.append(Pair(str(number), record["instruction"], chosen, rejected))
        agreement.append(np.mean([0.5 if vote == 0 else float(vote == first) for vote in others]))
    agreement_N = np.asarray(agreement)
    say(f"votes: {len(pairs):,} pairs, others agree with {agreement_N.mean():.1%}")
    args = LabelNoise(path)
    features = word_features(pairs, args.dimensions)
    result = []
    for seed in range(seeds):
        scores = cross_fitted(features, np.zeros((1, len(pairs)), bool), args, np.random.default_rng(seed))
        mean_N = scores[0].mean(axis=0)
        fifths = np.array_split(np.argsort(mean_N), FIFTHS)
        result.append({
            "agreement": [float(agreement_N[fifth].mean()) for fifth in fifths],
            "out of fold": float(np.mean(mean_N > 0)), "auc of dissent": auc(-mean_N, agreement_N < 0.5),
        })  # fmt: skip
    return result
