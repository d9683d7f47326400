"""A model whose next token depends on the last one alone, all of its texts, and what programs make of them."""

from collections import defaultdict

import jax
import numpy as np
from scripted import memoryless_lm

from lmlab.inference.posterior import written
from lmlab.inference.smc import run, standard
from lmlab.inference.texts import prepare


def bigram_lm(vocab, max_length=64):
    """After token u comes v with the softmax of params["logits_VV"][u]."""
    last = lambda tokens_BT: jax.nn.one_hot(tokens_BT, vocab)
    return memoryless_lm(vocab, last, lambda params, hidden: hidden @ params["logits_VV"], max_length)


def random_params(vocab, seed=0):
    return {"logits_VV": jax.random.normal(jax.random.key(seed), (vocab, vocab))}


def chances(params, first, ends, longest):
    """Probability of each text after a prompt that ends with `first`: it has `longest` tokens, or ends before."""
    p_VV = np.asarray(jax.nn.softmax(params["logits_VV"]), float)
    done, going = {}, {(): 1.0}
    while going:
        text, p = going.popitem()
        if len(text) == longest or (text and text[-1] in ends):
            done[text] = p
        else:
            going |= {(*text, v): p * p_VV[text[-1] if text else first, v] for v in range(len(p_VV))}
    return done


def runs(lm, params, program, firsts, longest, particles=4, count=2000, driver=None, seed=0):
    """Populations of as many runs, after prompts of one token each: log-weights and tokens [count, P, ...]."""
    driver = driver or standard()
    prompts = [np.asarray([first], np.int32) for first in firsts]
    model, state = prepare(lm, params, program, prompts, particles, longest)

    def one(key):
        population = run(model, driver, (params, program.tables), state, key, longest)
        texts = written(population.state)
        return population.log_weight_P, texts.tokens_PS, texts.length_P, texts.finished_P

    return [np.asarray(x) for x in jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(seed), count))]


def marks(text):
    """What is counted of a text; single ones are too rare."""
    return "all", ("first", text[:1]), ("second", text[1:2]), ("last", text[-1:]), ("length", len(text))


def assert_posterior(made, weights, sigmas=4.5):
    """Runs weigh each kind of text as `weights` say, in the mean; Z is among it, and no text of weight 0."""
    log_weight_CP, tokens_CPS, length_CP, _ = made
    assert not np.isnan(log_weight_CP).any()
    wanted, seen = defaultdict(float), defaultdict(lambda: np.zeros(len(log_weight_CP)))
    for text, weight in weights.items():
        for mark in marks(text):
            wanted[mark] += weight
    for c, p in np.argwhere(log_weight_CP > -np.inf):
        text = tuple(tokens_CPS[c, p, : length_CP[c, p]].tolist())
        assert weights.get(text, 0) > 0, text
        for mark in marks(text):
            seen[mark][c] += np.exp(log_weight_CP[c, p]) / log_weight_CP.shape[1]
    for mark, mean in wanted.items():
        error = seen[mark].std() / np.sqrt(len(log_weight_CP))
        assert abs(seen[mark].mean() - mean) < sigmas * error + 1e-3 * wanted["all"], (mark, seen[mark].mean(), mean)
