"""The queue over a batch of rows gives each prompt what the definition of a sample says, whoever sat beside it."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scripted import END, counting_lm

from lmlab.core.errors import UserError
from lmlab.core.sharding import MESH_AXES
from lmlab.inference import engine
from lmlab.inference import sample as sampling
from lmlab.inference.config import SamplingConfig
from lmlab.inference.draw import draw_tokens
from lmlab.inference.engine import read_prompts
from lmlab.inference.filters import filter_logits
from lmlab.inference.sample import Sample, draw, sample
from lmlab.models.config import AttentionConfig, ExecutionConfig
from lmlab.testing.tables import CACHES, LMS
from lmlab.testing.tiny import VOCAB, lively, tiny_lm

KEY = jax.random.key(5)
LONGEST = 32
LENGTHS = (1, 4, 5, 8, 9, 2, 17)


def prompts_of(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, length).astype(np.int32) for length in lengths]


PROMPTS = prompts_of(*LENGTHS)
COUNTING = counting_lm()


def parameters(lm):
    return jax.jit(lambda key: lively(lm.init(key)))(jax.random.key(0))


@partial(jax.jit, static_argnums=(0, 4))
def by_definition(lm, params, tokens_BT, prompt_B, config):
    """Logits of what follows each place, [B, T, V], by one pass without a cache; and the token that follows, [B, T].

    Token t of prompt i is what fold_in(fold_in(key, i), t) draws from the logits after all that is before it.
    """
    logits_BTV = lm.logits(params, lm.apply(params, tokens_BT)[0])
    batch, length, vocab = logits_BTV.shape
    number_BT = jnp.maximum(jnp.arange(1, length + 1)[None] - prompt_B[:, None], 0)
    keys_B = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(KEY, jnp.arange(batch))
    keys_BT = jax.vmap(jax.vmap(jax.random.fold_in, in_axes=(None, 0)))(keys_B, number_BT)
    following_X = draw_tokens(keys_BT.reshape(-1), filter_logits(logits_BTV.reshape(-1, vocab), config))
    return jax.nn.log_softmax(logits_BTV), following_X.reshape(batch, length)


def defined(lm, params, prompts, samples, config):
    """For each sample: log p [n, V] at its tokens and at the one after them, and those that definition draws there."""
    rows = [np.concatenate([prompt, one.tokens]) for prompt, one in zip(prompts, samples, strict=True)]
    # What pads the end is not seen from before it.
    tokens_BT = np.stack([np.pad(row, (0, LONGEST - len(row))) for row in rows])
    found = by_definition(lm, params, tokens_BT, np.asarray(list(map(len, prompts))), config)
    logprobs_BTV, following_BT = map(np.asarray, found)
    places = [slice(len(prompt) - 1, len(row)) for prompt, row in zip(prompts, rows, strict=True)]
    return [(logprobs_BTV[i, part], following_BT[i, part]) for i, part in enumerate(places)]


def assert_drawn_by_definition(lm, params, prompts, samples, config, end_ids=()):
    """Tokens, log-probabilities and ends of all samples are those of the definition."""
    for prompt, one, (logprobs_TV, wanted_T) in zip(
        prompts, samples, defined(lm, params, prompts, samples, config), strict=True
    ):
        size = len(one.tokens)
        assert one.tokens.tolist() == wanted_T[:size].tolist()
        np.testing.assert_allclose(one.logprobs, logprobs_TV[np.arange(size), one.tokens], atol=1e-5)
        if one.ended:
            assert wanted_T[size] in end_ids
        else:
            assert size == min(config.max_new_tokens, lm.max_length - len(prompt))


@pytest.mark.parametrize("name", [*CACHES, "stacked"])
def test_seven_prompts_on_two_rows_are_each_drawn_by_definition(name, monkeypatch):
    # Chunks shorter than most prompts, and the last of them wider than the room that is left in the context.
    monkeypatch.setattr(engine, "CHUNK", 4)
    lm = LMS["llama" if name == "stacked" else name]()
    if name == "stacked":  # as on other machines than CPUs
        lm = replace(lm, for_decoding=lambda params: (lm, params))
    params, config, end_ids = parameters(lm), SamplingConfig(max_new_tokens=14, temperature=0.8), (3,)
    lengths = dict.fromkeys(range(len(PROMPTS)), 0)
    samples = {}
    for update in draw(lm, params, PROMPTS, KEY, config, end_ids=end_ids, rows=2, stride=5):
        assert update.number not in samples
        assert len(update.sample.tokens) == len(update.sample.logprobs) >= lengths[update.number]
        lengths[update.number] = len(update.sample.tokens)
        if update.finished:
            samples[update.number] = update.sample
    found = [samples[number] for number in range(len(PROMPTS))]
    assert_drawn_by_definition(lm, params, PROMPTS, found, config, end_ids)
    # Rows ended at different times, some at the end token and some at their limit; of a model that draws all symbols.
    assert name != "llama" or len(set(lengths.values())) > 2


LM = tiny_lm(max_length=LONGEST)
PARAMS = parameters(LM)


def test_the_context_ends_rows_and_the_last_place_is_used():
    lm = LMS["gpt2"]()
    params, prompts = parameters(lm), prompts_of(LONGEST - 1, 3, LONGEST - 2, LONGEST - 6)
    config = SamplingConfig(max_new_tokens=100)
    samples = sample(lm, params, prompts, KEY, config, rows=2)
    assert [len(one.tokens) for one in samples] == [1, LONGEST - 3, 2, 6]
    assert_drawn_by_definition(lm, params, prompts, samples, config)


def test_bfloat16_rows_stay_near_the_full_pass():
    lm = tiny_lm(execution=ExecutionConfig(compute_dtype="bfloat16"))
    samples = sample(lm, PARAMS, PROMPTS, KEY, SamplingConfig(max_new_tokens=10), rows=3)
    for one, (logprobs_TV, _) in zip(samples, defined(lm, PARAMS, PROMPTS, samples, SamplingConfig()), strict=True):
        np.testing.assert_allclose(one.logprobs, logprobs_TV[np.arange(10), one.tokens], atol=0.15)


def test_equal_prompts_are_read_once(monkeypatch):
    read = []
    monkeypatch.setattr(sampling, "read_prompts", lambda *args: read.append(len(args[2])) or read_prompts(*args))
    one, other = prompts_of(3, 5)
    prompts = [one, other, one, one, other, one]
    config = SamplingConfig(max_new_tokens=4)
    assert_drawn_by_definition(LM, PARAMS, prompts, sample(LM, PARAMS, prompts, KEY, config), config)
    assert read == [2]
    again = sample(LM, PARAMS, [one.astype(np.int64), *prompts[1:]], KEY, config)
    assert read == [2, 2]
    assert_drawn_by_definition(LM, PARAMS, prompts, again, config)


def test_prompts_are_told_apart_whatever_their_type():
    # The bytes of one are those of the other.
    prompts = [np.asarray([1], np.int64), np.asarray([1, 0], np.int32)]
    samples = sample(COUNTING, {}, prompts, KEY, SamplingConfig(max_new_tokens=2))
    assert [one.tokens.tolist() for one in samples] == [[2, 3], [1, 2]]


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("chunk", [1, 4])
def test_chunks_are_one_pass(window, chunk, monkeypatch):
    monkeypatch.setattr(engine, "CHUNK", chunk)
    lm = tiny_lm(attention=AttentionConfig(heads=4, kv_heads=2, window=window))
    prompts = prompts_of(1, 3, 4, 5, 16, 17)
    # No room for what pads the last chunk.
    logits_NV, cache = read_prompts(lm, PARAMS, prompts, room=18)
    following = np.arange(8, dtype=np.int32)[:, None] % VOCAB
    hidden_N1D, _ = lm.apply(PARAMS, following, cache=cache)
    found_N2V = jax.nn.log_softmax(jnp.stack([logits_NV, lm.logits(PARAMS, hidden_N1D[:, 0])], axis=1))
    drawn = [Sample(token, np.zeros(1), ended=False) for token in following]
    for n, (logprobs_2V, _) in enumerate(defined(lm, PARAMS, prompts, drawn[: len(prompts)], SamplingConfig())):
        np.testing.assert_allclose(found_N2V[n], logprobs_2V, atol=2e-5)


def test_room_and_strides_change_nothing(monkeypatch):
    lm = tiny_lm(max_length=128)
    prompts, config = prompts_of(40, 3, 9), SamplingConfig(max_new_tokens=50)
    rooms = []
    monkeypatch.setattr(sampling, "decode", lambda *args: rooms.append(args[2].tokens_BS.shape[1]) or decode(*args))
    decode = engine.decode
    found = []
    for least, stride in ((128, 50), (8, 7)):
        monkeypatch.setattr(sampling, "LEAST_ROOM", least)
        news = draw(lm, PARAMS, prompts, KEY, config, rows=2, stride=stride)
        found.append({update.number: update.sample for update in news if update.finished})
    # Room for what a stride may need, and never less again.
    assert set(rooms) == {48, 64, 96, 128}
    assert sorted(rooms[rooms.index(48) :]) == rooms[rooms.index(48) :]
    for number in range(3):
        assert found[0][number].tokens.tolist() == found[1][number].tokens.tolist()
        np.testing.assert_allclose(found[0][number].logprobs, found[1][number].logprobs, atol=1e-5)


def test_news_that_nobody_waits_for_leaves_no_trace():
    config = SamplingConfig(max_new_tokens=9)
    news = draw(LM, PARAMS, PROMPTS[:3], KEY, config, rows=2, stride=4)
    first = next(news)
    kept = first.sample.tokens.copy()
    second = next(news)
    news.close()
    samples = sample(LM, PARAMS, PROMPTS[:3], KEY, config, rows=2)
    assert (first.number, second.number) == (0, 1)
    assert not first.finished
    assert first.sample.tokens.tolist() == kept.tolist() == samples[0].tokens[:4].tolist()


def test_a_stop_frees_its_row_for_the_next():
    looks = []

    def stopped(tokens):
        looks.append(tokens)
        return 3 if len(tokens) >= 3 else None

    prompts = [np.asarray([start], np.int32) for start in (1, 11, 21, 31, 41)]
    news = list(draw(COUNTING, {}, prompts, KEY, SamplingConfig(max_new_tokens=40), stopped=stopped, rows=2, stride=4))
    assert [update.number for update in news] == [0, 1, 2, 3, 4]
    for start, update in zip((1, 11, 21, 31, 41), news, strict=True):
        assert update.finished
        assert update.sample.ended
        assert update.sample.tokens.tolist() == [start + 1, start + 2, start + 3]
    # What a stop was asked about stays as it was, though the batch went on.
    assert [tokens.tolist() for tokens in looks] == [list(range(s + 1, s + 5)) for s in (1, 11, 21, 31, 41)]


@pytest.mark.parametrize("stride", [19, 20, 21, 40])
def test_an_end_token_at_the_very_limit_is_an_end(stride):
    start = np.asarray([END - 20], np.int32)
    lengths, ends = [], []
    for size in (19, 20):
        config = SamplingConfig(max_new_tokens=size)
        *_, last = draw(COUNTING, {}, [start], KEY, config, end_ids=(END,), stride=stride)
        assert last.finished
        lengths.append(len(last.sample.tokens))
        ends.append(last.sample.ended)
    assert lengths == [19, 19]
    assert ends == [False, True]


def two_on(logits_BV, tokens_BS, length_B):
    """The token two after the last."""
    last_B = tokens_BS[jnp.arange(len(length_B)), length_B - 1]
    return jnp.where(jnp.arange(logits_BV.shape[1])[None] == (last_B[:, None] + 2) % 60, logits_BV, -jnp.inf)


def test_processors_see_prompt_and_drawn_tokens_and_rule_the_draw():
    prompts = [np.asarray(prompt, np.int32) for prompt in ([4], [9, 1], [7, 7, 30])]
    config = SamplingConfig(max_new_tokens=5)
    samples = sample(COUNTING, {}, prompts, KEY, config, processors=(two_on,), rows=2)
    for prompt, one in zip(prompts, samples, strict=True):
        assert one.tokens.tolist() == [prompt[-1] + 2 * i for i in range(1, 6)]
        # Under the model itself, for which they are improbable.
        np.testing.assert_allclose(one.logprobs, -100, atol=1e-3)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_forbidden_token_is_never_drawn(temperature):
    forbid = lambda logits_BV, tokens_BS, length_B: logits_BV.at[:, 2].set(-jnp.inf)
    config = SamplingConfig(max_new_tokens=20, temperature=temperature)
    drawn = lambda *processors: np.concatenate(
        [one.tokens for one in sample(LM, PARAMS, PROMPTS[:4], KEY, config, processors=processors)]
    )
    assert 2 in drawn()
    assert 2 not in drawn(forbid)


def test_the_penalty_comes_before_processors_and_they_before_the_temperature():
    seen = lambda logits_BV, tokens_BS, length_B: jnp.where(logits_BV > 60, 0.0, logits_BV)
    config = SamplingConfig(max_new_tokens=3, temperature=0.0, repetition_penalty=2.0)
    # After 1 comes 2, which the prompt holds: 100 becomes 50, which the processor lets pass. 3, new, it does not: the
    # first token of all is the best. After 0 comes 1, which the prompt holds.
    one = sample(COUNTING, {}, [np.asarray([2, 1], np.int32)], KEY, config, processors=(seen,))[0]
    assert one.tokens.tolist() == [2, 0, 1]
    # Were logits divided first, 100 would pass.
    cooled = SamplingConfig(max_new_tokens=1, temperature=10.0, top_k=1)
    one = sample(COUNTING, {}, [np.asarray([5], np.int32)], KEY, cooled, processors=(seen,))[0]
    assert one.tokens.tolist() != [6]


def test_a_mesh_draws_the_same():
    config = SamplingConfig(max_new_tokens=6, top_p=0.9)
    lm = tiny_lm(vocab_size=8)
    params = parameters(lm)
    alone = sample(lm, params, PROMPTS[:5], KEY, config, rows=2)
    kinds = (jax.sharding.AxisType.Auto,) * 4
    mesh = jax.make_mesh((1, 2, 1, 2), MESH_AXES, kinds, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        by_vocabulary = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("tensor", "fsdp"))
        placed = jax.device_put(params, whole) | {"embedding": jax.device_put(params["embedding"], by_vocabulary)}
        found = sample(lm, placed, PROMPTS[:5], KEY, config, rows=2)
    for one, other in zip(alone, found, strict=True):
        assert one.tokens.tolist() == other.tokens.tolist()
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)


def test_keys_of_any_kind_draw():
    for key in (jax.random.key(1, impl="rbg"), jax.random.PRNGKey(1)):
        assert len(sample(COUNTING, {}, PROMPTS[:1], key, SamplingConfig(max_new_tokens=2))[0].tokens) == 2


@pytest.mark.parametrize("wrong", ["rows", "stride"])
def test_batches_that_cannot_be_are_refused(wrong):
    with pytest.raises(UserError, match=wrong):
        next(draw(COUNTING, {}, PROMPTS[:1], KEY, SamplingConfig(), **{wrong: 0}))
