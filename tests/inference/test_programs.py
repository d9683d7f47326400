"""Programs over a language model: what each primitive does, and that what comes out follows the posterior."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bigrams import END, LONGEST, SYMBOLS, TEXTS, errors, text_weights

from lmlab.inference.distributions import Bernoulli, Categorical, Geometric, draw_token
from lmlab.inference.programs import Particle, Program
from lmlab.inference.resampling import stratified, systematic
from lmlab.inference.smc import run, standard, steering
from lmlab.inference.texts import begin, infer, program_model
from lmlab.models.config import AttentionConfig, MLPConfig
from lmlab.testing.tiny import lively, tiny_lm

LM = tiny_lm(
    vocab_size=SYMBOLS, max_length=16, layers=1, width=8, attention=AttentionConfig(heads=2, kv_heads=1),
    mlp=MLPConfig(width=8),
)  # fmt: skip
PARAMS = lively(jax.jit(LM.init)(jax.random.key(0)), seed=7)
PROMPTS = [np.asarray([1, 0], np.int32), np.asarray([0, 2, 1], np.int32)]
ALLOWED = jnp.asarray([[True, True, False], [False, True, True], [True, False, True]])
DRIVERS = {
    **{f"steering_{n}_{k}": (steering(k), n) for n, k in ((1, 3), (2, 3), (5, 1), (5, 3))},
    "stratified": (standard(stratified, 0.5), 5), "systematic": (standard(systematic, 1.0), 2),
}  # fmt: skip
RUNS, THREE = 2000, steering(3)


@cache
def text_logprobs(prompt, temperature=1.0):
    """Log p of each of TEXTS after a prompt."""
    whole_XT = jnp.asarray([[*PROMPTS[prompt], *text, *[0] * (LONGEST - len(text))] for text in TEXTS])
    hidden_XTD, _ = LM.apply(PARAMS, whole_XT[:, :-1])
    logprobs_XTV = jax.nn.log_softmax(LM.logits(PARAMS, hidden_XTD)[:, len(PROMPTS[prompt]) - 1 :] / temperature)
    logprobs_XTV = np.asarray(logprobs_XTV, np.float64)
    return np.asarray(
        [sum(rows[t, v] for t, v in enumerate(text)) for rows, text in zip(logprobs_XTV, TEXTS, strict=True)]
    )


def walk(p, last):
    """What is allowed after what, known to the proposal as far as `tables["mask"]` says."""
    p.observe(p.context.mask(p.tables["mask"][last]), True)
    token = p.sample(p.context.next_token())
    p.condition(p.tables["allowed"][last, token])
    p.finish(token == END)
    return token


def free(p, state):
    p.finish(p.sample(p.context.next_token()) == END)
    return state


def both(p, state):
    """Under both prompts; the proposal knows of the second as far as the tables say."""
    first, second = (context.logprobs_V for context in p.contexts)
    token = p.sample(p.contexts[0].next_token(), Categorical(first + p.tables * second))
    p.observe(p.contexts[1].next_token(), token)
    p.finish(token == END)
    return state


WALK, FREE = Program(walk, jnp.int32(0), {"mask": ALLOWED, "allowed": ALLOWED}), Program(free)
BOTH = Program(both, contexts=2, temperature=0.7)


def weigh(program, driver, particles, tables, seed=0):
    """Parts of the mean weight of each of TEXTS, in many runs, for each of the tables; they have a first axis."""
    model = program_model(LM, program)
    state = begin(LM, PARAMS, program, PROMPTS[: program.contexts], particles, LONGEST)
    one = lambda tables, key: run(model, driver, (PARAMS, tables), state, key, LONGEST)
    many = jax.jit(jax.vmap(one, (None, 0)))
    for i in range(len(jax.tree.leaves(tables)[0])):
        keys = jax.random.split(jax.random.key(seed + i), RUNS)
        found = many(jax.tree.map(lambda x, i=i: x[i], tables), keys)
        yield text_weights(found.state.tokens_PS, found.state.length_P, found.log_weight_P)


def last_of(program, driver=THREE, key=0, **changes):
    """The last population of a run."""
    changes = {"particles": 4, "tokens": LONGEST, **changes}
    *_, found = infer(LM, PARAMS, program, PROMPTS[: program.contexts], jax.random.key(key), driver, **changes)
    return found


@pytest.mark.parametrize("name", DRIVERS)
def test_constrained_texts_follow_the_posterior(name):
    allowed = [all(ALLOWED[u, v] for u, v in zip((0, *text), text, strict=False)) for text in TEXTS]
    weight_X = np.exp(text_logprobs(0)) * allowed
    driver, particles = DRIVERS[name]
    plain_and_ahead = {"mask": jnp.stack([jnp.ones_like(ALLOWED), ALLOWED]), "allowed": jnp.stack([ALLOWED] * 2)}
    for share_RX in weigh(WALK, driver, particles, plain_and_ahead, 10 * list(DRIVERS).index(name)):
        assert abs(errors(share_RX.sum(axis=1), weight_X.sum())) < 3
        often_X = (share_RX > 0).mean(axis=0) > 0.05
        assert not share_RX[:, weight_X == 0].any()
        assert np.abs(errors(share_RX, weight_X)[often_X]).max() < 4
        assert often_X.sum() >= 3


def test_the_intersection_of_two_prompts_is_the_sum_of_products():
    weight_X = np.exp(text_logprobs(0, 0.7) + text_logprobs(1, 0.7))
    variances = []
    for share_RX in weigh(BOTH, steering(2), 3, jnp.asarray([0.0, 1.0])):
        assert abs(errors(share_RX.sum(axis=1), weight_X.sum())) < 3
        assert np.abs(errors(share_RX, weight_X)[(share_RX > 0).mean(axis=0) > 0.05]).max() < 4
        variances.append(share_RX.sum(axis=1).var())
    # The locally optimal proposal is the better one.
    assert variances[1] < variances[0]


def test_one_particle_without_a_constraint_is_ancestral_sampling():
    lengths = set()

    @jax.jit
    def draw(key, tokens_S, t):
        hidden_1SD, _ = LM.apply(PARAMS, tokens_S[None])
        propose_key, _ = jax.random.split(jax.random.fold_in(key, t))
        key = jax.random.fold_in(jax.random.split(propose_key, (1, 1))[0, 0], 1)
        return draw_token(key, jax.nn.log_softmax(LM.logits(PARAMS, hidden_1SD[0, len(PROMPTS[0]) + t - 1])))

    for seed in range(6):
        found, tokens = last_of(FREE, steering(1), seed, particles=1), []
        while len(tokens) < LONGEST and END not in tokens:
            padded = jnp.asarray([*PROMPTS[0], *tokens, *[0] * (LONGEST - len(tokens))])
            tokens.append(int(draw(jax.random.key(seed), padded, len(tokens))))
        length = int(found.state.length_P[0])
        lengths.add(length)
        assert found.state.tokens_PS[0, :length].tolist() == tokens
        assert float(found.log_weight_P[0]) == 0
        assert bool(found.state.finished_P[0]) == (END in tokens)
    assert len(lengths) > 1


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_what_is_observed_weighs_its_probability_and_what_is_intervened_nothing(temperature):
    ends = {}
    for name in ("observe", "intervene"):

        def step(p, state, name=name):
            for context in p.contexts:
                getattr(p, name)(context.next_token(), p.tables[p.length])
            return state

        text = (1, 0, 0, 1)
        program = Program(step, tables=jnp.asarray(text), contexts=2, temperature=temperature)
        ends[name] = last_of(program, particles=2)
    expected = sum(text_logprobs(prompt, temperature)[TEXTS.index(text)] for prompt in (0, 1))
    np.testing.assert_allclose(ends["observe"].log_weight_P, expected, rtol=1e-5)
    np.testing.assert_array_equal(ends["intervene"].log_weight_P, 0)
    np.testing.assert_array_equal(ends["observe"].state.tokens_PS, [text, text])
    jax.tree.map(np.testing.assert_array_equal, ends["observe"].state, ends["intervene"].state)


def test_the_weights_of_one_step():
    logprobs_MV = jnp.log(jnp.asarray([[0.2, 0.3, 0.5], [0.1, 0.1, 0.8]]))
    new = lambda: Particle(jax.random.key(0), logprobs_MV, (), jnp.int32(0))
    weight = lambda p: pytest.approx(float(jnp.exp(p.log_weight)), rel=1e-5)
    p = new()
    token = p.sample(p.context.next_token())
    assert weight(p) == 1
    assert int(p.context.token) == int(token)
    p = new()
    q = Categorical(jnp.log(jnp.asarray([0.6, 0.3, 0.1])))
    token = int(p.sample(p.context.next_token(), q))
    assert weight(p) == (0.2 / 0.6, 1, 5)[token]
    p = new()  # A mask, then its complement among what is left: .8 * .375 and only token 1 remains.
    p.observe(p.context.mask(jnp.asarray([False, True, True])), True)
    p.observe(p.context.mask(jnp.asarray([True, True, False])), True)
    assert weight(p) == 0.3
    assert int(p.sample(p.context.next_token())) == 1
    assert weight(p) == 0.3
    p = new()
    p.observe(p.contexts[1].mask(jnp.asarray([False, False, True])), False)
    p.observe(p.contexts[1].next_token(), 1)
    assert weight(p) == 0.1
    p = new()
    p.score(-1.0)
    p.score(jnp.log(3.0))
    p.observe(Bernoulli(0.25), False)
    p.observe(Geometric(0.5), 2)
    assert weight(p) == 3 * np.exp(-1) * 0.75 * 0.25
    p.finish(jnp.asarray(False))
    p.finish(jnp.asarray(True))
    p.score(5.0)
    p.condition(False)
    assert weight(p) == 3 * np.exp(-1) * 0.75 * 0.25
    assert bool(p.finished)
    p = new()
    p.condition(True)
    assert weight(p) == 1
    p.condition(jnp.asarray(False))
    assert float(p.log_weight) == -np.inf
    for impossible in (Categorical(jnp.full(3, -jnp.inf)), Categorical(jnp.asarray([-jnp.inf, -jnp.inf, 0.0]))):
        p = new()
        p.sample(impossible, Categorical(jnp.asarray([0.0, 0.0, -jnp.inf])))
        assert float(p.log_weight) == -np.inf
    assert len({int(jax.random.key_data(new().key())[1]) for _ in range(3)}) == 1
    assert (jax.random.key_data(p.key()) != jax.random.key_data(p.key())).any()


def test_a_failed_condition_is_the_end():
    def step(p, state):
        token = p.sample(p.context.next_token())
        p.finish(token == END)
        p.condition(p.length < 1)
        return state

    found = last_of(Program(step), standard(threshold=0), particles=8)
    ended_P = np.asarray(found.state.finished_P)
    assert 0 < ended_P.sum() < 8
    np.testing.assert_array_equal(found.log_weight_P, np.where(ended_P, 0, -np.inf))
    assert int(found.rounds) == 2
    assert found.done_P.all()
    never = Program(lambda p, state: (p.sample(p.context.next_token()), p.condition(False), state)[-1])
    for driver in (THREE, standard(systematic, 1.0)):
        dead = last_of(never, driver)
        assert int(dead.rounds) == 1
        np.testing.assert_array_equal(dead.log_weight_P, np.full(4, -np.inf))
        np.testing.assert_array_equal(dead.probabilities, np.zeros(4))
        assert float(dead.log_evidence) == -np.inf


def test_a_twist_is_taken_back():
    def step(p, state):
        token = p.sample(p.context.next_token())
        p.twist(p.tables[token])
        p.finish(token == END)
        return state

    tables = jnp.asarray([0.5, -1.5, 3.0])
    program = Program(step, tables=tables)

    def populations(stop):
        return infer(
            LM, PARAMS, program, PROMPTS[:1], jax.random.key(1), standard(threshold=0), particles=8, tokens=LONGEST,
            stride=1, stop=stop,
        )  # fmt: skip

    for found in populations(stop=lambda: False):
        ended_P, length = np.asarray(found.state.finished_P), int(found.rounds)
        lent = np.zeros(8) if found.done_P.all() else tables[found.state.tokens_PS[:, length - 1]]
        np.testing.assert_allclose(found.log_weight_P, np.where(ended_P, 0, lent), atol=1e-6)
    assert 0 < ended_P.sum() < 8
    (cut,) = populations(stop=lambda: True)
    assert not cut.done_P.all()
    np.testing.assert_allclose(cut.log_weight_P, 0, atol=1e-6)
