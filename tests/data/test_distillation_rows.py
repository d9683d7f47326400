"""Examples in rows: the same labels on both sides, wherever they lie; what does not fit is told or counted."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from lmlab.core.errors import UserError
from lmlab.data.distillation import (
    Example,
    distillation_of,
    distillation_stream,
    fitting,
    lay_out_examples,
    split_prompts,
    with_stored,
)
from lmlab.data.top_k import StoredTeacher, load_stored
from lmlab.testing.tiny import random_examples

EXAMPLES = random_examples(11, seed=1, contexts=3)
IDS = lambda *tokens: np.asarray(tokens, np.int32)


def readings(batch):
    """Of every answer in a batch: what each side reads before it, the answer, its weight, by row and number."""
    found = []
    for b in range(len(batch.weights_BA)):
        for number in range(1, int(batch.student.answers_BA[b].max()) + 1):
            held = batch.student.answers_BA[b] == number
            sides = []
            for side in (batch.teacher, batch.student):
                place = int(side.places_BA[b][held][0])
                last = int(side.ends_BS[b, number - 1])
                seen = (side.segments_BT[b] == side.segments_BT[b, place]) & (
                    np.arange(len(side.tokens_BT[b])) <= place
                )
                if side.branches_BT is not None:
                    seen &= np.isin(side.branches_BT[b], (0, side.branches_BT[b, place]))
                sides.append((side.tokens_BT[b][seen].tolist(), side.tokens_BT[b, place + 1 : last + 1].tolist()))
                positions = side.positions_BT[b][seen].tolist()
                assert positions == list(range(len(positions)))
            assert sides[0][1] == sides[1][1] == batch.student.labels_BA[b][held].tolist()
            np.testing.assert_array_equal(batch.teacher.labels_BA[b], batch.student.labels_BA[b])
            weight = set(batch.weights_BA[b][held].tolist())
            assert len(weight) == 1
            found.append((sides[0][0], sides[1][0], sides[0][1], weight.pop()))
    return sorted(found)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("per_row", [0, 1, 2])
def test_both_sides_read_their_own_and_predict_the_same(shared, per_row):
    rows = lay_out_examples(EXAMPLES, 32, 24, shared=shared, per_row=per_row)
    batch = distillation_of(rows, range(rows.rows), rows.rows + 1)
    wanted = sorted(
        (
            np.concatenate([x.context, x.inputs, x.scratchpad]).tolist(),
            np.concatenate([x.student_context, x.inputs]).tolist(),
            x.answer.tolist(),
            x.weight,
        )
        for x in EXAMPLES
    )
    assert readings(batch) == wanted
    assert batch.weights_BA.sum() == pytest.approx(sum(x.weight * len(x.answer) for x in EXAMPLES))
    assert not batch.weights_BA[-1].any()
    assert not batch.student.segments_BT[-1].any()
    if shared and per_row != 1:
        assert rows.rows < len(EXAMPLES)


def test_a_label_in_the_wrong_place_is_noticed():
    rows = lay_out_examples(EXAMPLES[:1], 32, 24)
    moved = replace(rows, examples=[replace(EXAMPLES[0], answer=np.asarray([1.5]))])
    with pytest.raises(AssertionError, match="does not stand"):
        distillation_of(moved, [0], 1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"answer": IDS()}, "an empty answer"),
        ({"inputs": IDS()}, "at least one token before the answer"),
        ({"context": np.zeros(40, np.int32)}, "for the teacher"),
        ({"student_context": np.zeros(30, np.int32)}, "for the student"),
        ({"weight": -1.0}, "0 or more"),
    ],
)
def test_examples_that_no_row_can_hold_are_named(change, said):
    with pytest.raises(UserError, match=said) as caught:
        lay_out_examples([EXAMPLES[0], replace(EXAMPLES[1], **change)], 32, 24)
    assert EXAMPLES[1].where in str(caught.value)


def test_nothing_to_learn_is_an_error():
    for none in ([], [replace(x, weight=0.0) for x in EXAMPLES]):
        with pytest.raises(UserError, match=r"at least one|more than 0"):
            lay_out_examples(none, 32, 24)


def test_what_does_not_fit_is_dropped_and_counted():
    long, empty = replace(EXAMPLES[0], context=np.zeros(40, np.int32)), replace(EXAMPLES[0], answer=IDS())
    kept, counts = fitting([*EXAMPLES, long, empty, empty], 32, 24)
    assert len(kept) == counts["examples"] == len(EXAMPLES)
    assert (counts["dropped_long"], counts["dropped_empty"]) == (1, 2)


def test_prompts_are_split_where_their_common_end_begins():
    context, own, inputs = split_prompts(IDS(1, 2, 3, 7, 8), IDS(1, 4, 7, 8))
    assert (context.tolist(), own.tolist(), inputs.tolist()) == ([1, 2, 3], [1, 4], [7, 8])
    context, own, inputs = split_prompts(IDS(9, 7, 8), IDS(7, 8))
    assert (context.tolist(), own.tolist(), inputs.tolist()) == ([9], [], [7, 8])
    with pytest.raises(UserError, match="end in one token"):
        split_prompts(IDS(1, 2), IDS(1, 3))


def test_the_stream_is_the_same_on_any_number_of_hosts_and_goes_through_all():
    rows = lay_out_examples(EXAMPLES, 32, 24, per_row=1)
    whole = distillation_stream(rows, 4)
    halves = [distillation_stream(rows, 4, host=host, hosts=2) for host in (0, 1)]
    for step in (0, 7):
        parts = [stream.batch_at(step).student.tokens_BT for stream in halves]
        np.testing.assert_array_equal(np.concatenate(parts), whole.batch_at(step).student.tokens_BT)
    seen = {name for step in range(3) for name in whole.documents_at(step)}
    assert seen == {x.where for x in EXAMPLES}
    np.testing.assert_array_equal(next(iter(whole.batches(5))).weights_BA, whole.batch_at(5).weights_BA)


def stored(k=2):
    sizes = [len(x.answer) for x in EXAMPLES]
    offsets = np.cumsum([0, *sizes])
    logprobs = -np.arange(offsets[-1] * (k + 1)).reshape(-1, k + 1).astype(ml_dtypes.bfloat16)
    return StoredTeacher(offsets, logprobs, np.tile(np.arange(k, dtype=np.int32), (offsets[-1], 1)), 1.5, "abc")


def test_stored_predictions_come_back_and_lie_beside_their_labels(tmp_path):
    held = stored()
    held.save(tmp_path / "teacher.npz")
    again = load_stored(tmp_path / "teacher.npz", "abc")
    assert again.temperature == 1.5
    assert again.logprobs_nK.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(again.logprobs_nK, held.logprobs_nK)
    rows = with_stored(lay_out_examples(EXAMPLES, 32, 24), again)
    batch = distillation_of(rows, range(rows.rows), rows.rows)
    assert batch.teacher is None
    for row in range(rows.rows):
        here = 0
        for index in rows.order[rows.row_starts[row] : rows.row_starts[row + 1]]:
            size = len(EXAMPLES[index].answer)
            np.testing.assert_array_equal(batch.stored.logprobs_BAK[row, here : here + size], held.of(index)[0])
            here += size
    # 6 k + 2 bytes a label.
    assert held.logprobs_nK.nbytes + held.ids_nK.nbytes == 14 * held.offsets_N[-1]


def test_stored_predictions_of_others_are_refused(tmp_path):
    stored().save(tmp_path / "teacher.npz")
    with pytest.raises(UserError, match="of this teacher"):
        load_stored(tmp_path / "teacher.npz", "abd")
    (tmp_path / "torn.npz").write_bytes((tmp_path / "teacher.npz").read_bytes()[:50])
    for name in ("torn.npz", "absent.npz"):
        with pytest.raises(UserError, match="predictions of a teacher"):
            load_stored(tmp_path / name, "abc")
    with pytest.raises(UserError, match="for these examples"):
        with_stored(lay_out_examples(EXAMPLES[:3], 32, 24), stored())
    with pytest.raises(UserError, match="room to write"):
        stored().save(tmp_path / "no" / "teacher.npz")
    assert Example("a", IDS(1), IDS(2), IDS(3)).weight == 1
