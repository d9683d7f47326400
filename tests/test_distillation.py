"""Answers of teacher and student, stored predictions, and the experiment at toy size."""

import json
from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import context_distillation as experiment
from experiments import context_distillation_addition as addition
from experiments import context_distillation_tasks as tasks
from lmlab.core.errors import UserError
from lmlab.data.chat import ChatTemplate
from lmlab.data.distillation import distillation_of, lay_out_examples
from lmlab.data.tokenizers import byte_tokenizer
from lmlab.distillation import (
    after,
    check_lengths,
    distinct,
    on_policy,
    store_predictions,
    student_answers,
    teacher_answers,
    teacher_fingerprint,
)
from lmlab.inference.config import SamplingConfig
from lmlab.interop.huggingface import save_pretrained
from lmlab.interop.tokenizer_files import TokenizerFiles
from lmlab.models.config import AttentionConfig, TransformerConfig
from lmlab.models.transformer import transformer
from lmlab.objectives.distill import TEACHER, distill
from lmlab.testing.tiny import lively, random_examples, tiny_lm

LM = tiny_lm()
KEY = jax.random.key(0)
PARAMS = lively(LM.init(KEY))
EXAMPLES = random_examples(5, contexts=1)
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
GREEDY = SamplingConfig(max_new_tokens=6, temperature=0.0)


next_best = jax.jit(lambda params, row: jnp.argmax(LM.logits(params, LM.apply(params, row)[0]), axis=-1))


def greedy(prompt, count, end=None):
    """By full forward passes."""
    tokens = list(map(int, prompt))
    for _ in range(count):
        # One shape for all lengths: what comes after does not matter.
        row = jnp.asarray([tokens + [0] * (31 - len(tokens))])
        best = int(next_best(PARAMS, row)[0, len(tokens) - 1])
        tokens.append(best)
        if best == end:
            break
    return tokens[len(prompt) :]


def test_the_teacher_answers_after_the_context_and_the_student_without():
    told, counts = teacher_answers(LM, PARAMS, EXAMPLES[:2], KEY, GREEDY)
    own, _ = student_answers(LM, PARAMS, EXAMPLES[:2], KEY, GREEDY)
    assert counts == {"answered": 2, "without_answer": 0}
    for asked, mine, theirs in zip(EXAMPLES, told, own, strict=False):
        assert mine.answer.tolist() == greedy(np.concatenate([asked.context, asked.inputs]), 6)
        assert theirs.answer.tolist() == greedy(np.concatenate([asked.student_context, asked.inputs]), 6)
        assert len(mine.scratchpad) == len(theirs.scratchpad) == 0


def varied():
    """An example to which the teacher's greedy answer has tokens that differ, and that answer."""
    for seed in range(50):
        inputs = np.asarray(jax.random.randint(jax.random.key(seed), (4,), 0, LM.vocab_size), np.int32)
        example = replace(EXAMPLES[0], inputs=inputs)
        written = greedy(np.concatenate([example.context, inputs]), 6)
        if len(set(written)) > 2 and written[3] not in written[:3] and written[3] not in written[4:]:
            return example, written
    raise AssertionError("the tiny teacher says one thing only")


def test_scratchpads_are_cut_off_and_what_has_no_answer_is_counted():
    example, written = varied()
    told, counts = teacher_answers(LM, PARAMS, [example], KEY, GREEDY, extract=after(written[3]), samples=2)
    assert counts == {"answered": 2, "without_answer": 0}
    assert [x.scratchpad.tolist() for x in told] == [written[:4]] * 2
    assert [x.answer.tolist() for x in told] == [written[4:]] * 2
    absent = next(token for token in range(LM.vocab_size) if token not in written)
    assert teacher_answers(LM, PARAMS, [example], KEY, GREEDY, extract=after(absent)) == (
        [], {"answered": 0, "without_answer": 1})  # fmt: skip
    assert after(9)(np.asarray([1, 9, 2, 9])) is None
    assert [x.tolist() for x in after(9)(np.asarray([1, 9, 2, 9, 3, 4]))] == [[1, 9, 2, 9], [3, 4]]


def test_an_answer_that_ends_has_its_end():
    example, written = varied()
    told, _ = teacher_answers(LM, PARAMS, [example], KEY, GREEDY, end_ids=(written[3],))
    assert told[0].answer.tolist() == written[:4]


def test_a_share_of_the_answers_is_the_students():
    rng = np.random.default_rng(0)
    theirs, own = [replace(x, weight=1.0) for x in EXAMPLES * 40], [replace(x, weight=2.0) for x in EXAMPLES * 40]
    count = lambda share: sum(x.weight == 2 for x in on_policy(theirs, own, share, rng))
    assert (count(0.0), count(1.0)) == (0, 200)
    assert 70 < count(0.5) < 130
    for wrong in (lambda: on_policy(theirs, own, 1.5, rng), lambda: on_policy(theirs, own[:3], 0.5, rng)):
        with pytest.raises(UserError, match=r"lambda|examples"):
            wrong()


def test_inputs_that_return_are_left_out_and_counted():
    some = [replace(x, inputs=np.asarray([i], np.int32)) for i, x in enumerate(EXAMPLES)]
    kept, counts = distinct([*some, some[1], replace(some[2], context=np.asarray([1], np.int32))])
    assert counts == {"kept": 6, "duplicates": 1}
    assert [x.where for x in kept[:5]] == [x.where for x in some]


@pytest.mark.parametrize("shared", [True, False])
def test_stored_predictions_of_all_tokens_teach_nearly_what_the_teacher_does(shared):
    teacher = lively(PARAMS, seed=3)
    rows = lay_out_examples(EXAMPLES, 32, 24, shared=shared)
    stored = store_predictions(rows, LM, teacher, LM.vocab_size, batch_size=2)
    objective = distill(LM)
    count = rows.rows
    batches = [jax.tree.map(jnp.asarray, distillation_of(some, range(count), count)) for some in (rows, stored)]
    loss = jax.jit(lambda params, batch: objective(params, batch, KEY).losses["divergence"].sum)
    live, slopes = jax.jit(jax.value_and_grad(loss))({**PARAMS, TEACHER: teacher}, batches[0])
    held, others = jax.jit(jax.value_and_grad(loss))(PARAMS, batches[1])
    slopes.pop(TEACHER)
    assert float(held) == pytest.approx(float(live), rel=0.02)
    error = jax.tree.map(lambda a, b: jnp.linalg.norm(a - b) / (jnp.linalg.norm(b) + 1e-3), others, slopes)
    assert max(map(float, jax.tree.leaves(error))) < 0.05
    few = store_predictions(rows, LM, teacher, 2, batch_size=2)
    less = loss(PARAMS, jax.tree.map(jnp.asarray, distillation_of(few, range(count), count)))
    assert 0 < float(less) < float(held)
    for wrong in (0, LM.vocab_size + 1):
        with pytest.raises(UserError, match="vocabulary"):
            store_predictions(rows, LM, teacher, wrong)


def test_examples_that_a_model_has_no_room_for_are_named():
    rows = lay_out_examples([*EXAMPLES, replace(EXAMPLES[1], where="long", context=np.zeros(40, np.int32))], 64, 64)
    with pytest.raises(UserError, match=r"long.*the teacher.*max_length = 32"):
        store_predictions(rows, LM, PARAMS, 2)
    check_lengths(rows, LM, tiny_lm(max_length=64))


def test_the_fingerprint_knows_the_teacher_and_what_it_reads():
    rows = lay_out_examples(EXAMPLES, 32, 24)
    found = teacher_fingerprint(PARAMS, rows)
    assert teacher_fingerprint(PARAMS, lay_out_examples(EXAMPLES, 40, 30)) == found
    others = [
        teacher_fingerprint(lively(PARAMS, seed=9), rows),
        teacher_fingerprint(PARAMS, rows, 2.0),
        teacher_fingerprint(PARAMS, lay_out_examples(EXAMPLES[:4], 32, 24)),
        teacher_fingerprint(PARAMS, lay_out_examples([replace(EXAMPLES[0], scratchpad=np.asarray([1, 2, 3, 4, 5])),
                                                      *EXAMPLES[1:]], 32, 24)),
    ]  # fmt: skip
    assert len({found, *others}) == 5


def test_permutations_of_held_out_inputs_are_never_learnt():
    permutations = tasks.permutations()
    assert len({tuple(x) for x in permutations.tolist()}) == tasks.TASKS
    known, test = (tasks.draw_inputs(np.random.default_rng(0), 200, wanted) for wanted in (False, True))
    assert not {tuple(x) for x in known.tolist()} & {tuple(x) for x in test.tolist()}
    rows = tasks.pretraining_rows(jnp.asarray(known), jax.random.key(0), 40)
    for tokens, segments, labels in zip(
        *map(np.asarray, (rows.tokens_BT, rows.segments_BT, rows.label_mask_BT)), strict=True
    ):
        text = tokens[segments > 0].tolist()
        inputs, answer = text[-9:-5], tokens[labels].tolist()
        assert answer == text[-4:]
        fitting = [t for t, p in enumerate(permutations) if [inputs[i] for i in p] == answer]
        assert len(fitting) == 1
        if len(text) > 9:
            assert text[:3] == tasks.instruction(np.asarray(fitting[0])).tolist()
    chex.assert_trees_all_equal(jnp.sum(rows.label_mask_BT, axis=1), jnp.full(40, 4))


def test_scratchpads_add_from_the_right():
    question, work, answer = addition.written(jnp.asarray([[275, 48]]), 3)
    assert question.tolist() == [[2, 7, 5, addition.PLUS, 0, 4, 8, addition.EQUALS]]
    assert work.tolist() == [[3, 1, 2, 1, 3, 0, addition.ANSWER]]
    assert answer.tolist() == [[0, 3, 2, 3]]


def test_the_experiment_runs_and_writes_what_it_found(tmp_path, capsys):
    assert experiment.main(["--smoke", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "results.json").read_text())
    arms = result["tasks"]["arms"]
    assert set(arms) | set(result["addition"]["arms"]) == set(experiment.SMOKE)
    for arm in arms.values():
        assert np.shape(arm["without"]) == (11, 2)
        assert np.isfinite(arm["recovery"]).all()
    assert len(result["tasks"]["several"]) == 2 + 2 * (2 + 4 + 1)
    assert {np.shape(found) for found in result["tasks"]["several"].values()} == {(2, 4)}
    assert (tmp_path / "context_distillation.svg").read_text().startswith("<?xml")
    out = capsys.readouterr().out
    assert "recovery" in out
    assert "chat: skipped" in out


@pytest.fixture
def chatting(tmp_path):
    """A model that chats, and prompts for it."""
    config = TransformerConfig(vocab_size=260, layers=1, width=16, max_length=256, attention=AttentionConfig(heads=2))
    text = TokenizerFiles(byte_tokenizer(), ChatTemplate(TEMPLATE, {}), None)
    save_pretrained(tmp_path / "model", config, transformer(config).init(KEY), text)
    lines = [{"instruction": f"say {i}", "input": "", "output": f"{i} and {i}"} for i in range(20)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return ["--only", "chat", "--model", str(tmp_path / "model"), "--prompts", str(tmp_path / "prompts.jsonl"),
            "--persona", "rude", "--out", str(tmp_path / "out")]  # fmt: skip


def test_a_system_prompt_is_distilled_into_adapters_of_a_model_on_disk(chatting, tmp_path, capsys):
    assert experiment.main([*chatting, "--smoke"]) == 0
    found = json.loads((tmp_path / "out/results.json").read_text())["chat"]
    assert found["counts"]["answered"] == 12
    assert set(found["arms"]) == {"distilled, top 64", "control: no teacher"}
    for arm in found["arms"].values():
        assert np.isfinite([arm["nll"], arm["recovery"], arm["kl"], arm["drift"]]).all()
        assert arm["nll"] != found["floor"]["nll"]
        assert len(arm["texts"]) == 3
    assert not (tmp_path / "out/context_distillation.svg").exists()
    assert "recovery" in capsys.readouterr().out
    assert experiment.main([*chatting, "--chat-prompts", "80"]) == 2
    assert "--prompts" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--only", "x"], "--only"), (["--only", "chat"], "--model"), (["--steps", "7"], "--steps"),
        (["--model", "absent"], "--model"), (["--digits", "5"], "--digits"), (["--seeds", "0"], "--seeds"),
        (["--digits", "1"], "--labels"), (["--persona", " "], "--persona"),
    ],
)  # fmt: skip
def test_rude_input_gets_one_line(words, said, capsys):
    assert experiment.main(words) == 2
    assert said in capsys.readouterr().err
