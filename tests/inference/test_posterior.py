"""The posterior over texts: equal ones together, by weight; the same from a population of any program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmlab.core.errors import UserError
from lmlab.data.tokenizers import byte_tokenizer
from lmlab.inference.posterior import draw_text, merged, posterior
from lmlab.inference.programs import Program
from lmlab.inference.smc import only, steering
from lmlab.inference.texts import infer
from lmlab.testing.tiny import tiny_lm


def test_equal_texts_are_one_and_the_dead_are_none():
    weights = np.log([1, 2, 3, 4, 1e-30])
    weights[4] = -np.inf
    tokens = [np.asarray([i]) for i in range(5)]
    found = merged(["a", "b", "a", "a", "c"], tokens, [True, True, True, False, True], weights)
    assert [(one.text, one.finished, one.particles) for one in found] == [
        ("a", True, 2),
        ("a", False, 1),
        ("b", True, 1),
    ]
    np.testing.assert_allclose([one.probability for one in found], [0.4, 0.4, 0.2], rtol=1e-5)
    drawn = [draw_text(jax.random.key(i), found) for i in range(200)]
    assert 0.1 < sum(one.text == "b" for one in drawn) / 200 < 0.3
    assert merged(["a"], tokens[:1], [True], [-np.inf]) == []
    # Bytes that are no text are shown alike; they are not.
    found = merged(["\ufffd"] * 3, [tokens[0], tokens[1], tokens[1]], [True] * 3, np.zeros(3))
    assert [one.particles for one in found] == [2, 1]
    with pytest.raises(UserError, match="alive"):
        draw_text(jax.random.key(0), [])


@pytest.mark.parametrize("boundary", [None, lambda count: count % 2 == 0])
def test_a_population_tells_its_texts(boundary):
    lm, codec = tiny_lm(vocab_size=257), byte_tokenizer()
    ab = jnp.isin(jnp.arange(257), jnp.asarray(list(b"ab")))

    def step(p, count):
        p.observe(p.context.mask(p.tables), True)
        token = p.sample(p.context.next_token())
        p.finish((token == ord("b")) & (count == 1))
        return count + 1

    program = Program(step, jnp.int32(0), ab, boundary=boundary)
    prompt = np.asarray(list(b"x"), np.int32)
    particles, params = 8, lm.init(jax.random.key(0))
    *_, last = infer(lm, params, program, [prompt], jax.random.key(1), steering(2), particles=particles, tokens=4)
    found = posterior(codec, prompt, last)
    assert sum(one.probability for one in found) == pytest.approx(1, abs=1e-5)
    assert sum(one.particles for one in found) <= particles
    assert all(one.finished == (len(one.text) == 2) for one in found)
    assert {one.text for one in found if one.finished} <= {"ab", "bb"}
    assert {len(one.text) for one in found if not one.finished} <= {4}
    state = getattr(last.state, "inner", last.state)
    ended = posterior(codec, prompt, only(last, state.finished_P))
    assert [one.text for one in ended] == [one.text for one in found if one.finished]
