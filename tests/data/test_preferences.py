"""Pairs from files: every shape that is told of, tokens of prompt and answers apart, what is cut and dropped."""

import json

import numpy as np
import pytest
import tokenizers

from lmlab.core.errors import UserError
from lmlab.data.answers import lay_out_pairs, pairs_once, pairs_stream, preferences_of
from lmlab.data.chat import ChatTemplate
from lmlab.data.open_pairs import read_pairs
from lmlab.data.pair_records import dialogue, prompt_key, read_pair
from lmlab.data.pairs_config import PairsConfig
from lmlab.data.preferences import encode_pairs
from lmlab.data.tokenizers import byte_tokenizer, wrap_tokenizer
from lmlab.testing.tiny import random_pairs

TOKENIZER = byte_tokenizer()
TEMPLATE = ChatTemplate(
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}a:{% endif %}",
    {},
)
ASK = [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]
SAY = lambda text: {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    ("record", "prompt"),
    [
        ({"prompt": "q", "chosen": "yes", "rejected": "no"}, "q"),
        ({"instruction": "q", "input": "x", "chosen": "yes", "rejected": "no"}, "q\n\nx"),
        ({"instruction": "q", "input": "", "chosen": "yes", "rejected": "no"}, "q"),
        ({"prompt": ASK, "chosen": "yes", "rejected": [SAY("no")]}, tuple(ASK)),
        ({"conversation": ASK, "chosen": SAY("yes"), "rejected": SAY("no")}, tuple(ASK)),
        ({"messages": ASK, "chosen": "yes", "rejected": "no"}, tuple(ASK)),
        ({"chosen": [*ASK, SAY("yes")], "rejected": [*ASK, SAY("no")]}, tuple(ASK)),
        # As UltraFeedback has it: the question in all three places.
        ({"prompt": "hi", "chosen": [*ASK, SAY("yes")], "rejected": [*ASK, SAY("no")]}, tuple(ASK)),
        # HH with the prompt in both places.
        (
            {
                "prompt": "\n\nHuman: a\n\nAssistant:",
                "chosen": "\n\nHuman: a\n\nAssistant:yes",
                "rejected": "\n\nHuman: a\n\nAssistant:no",
            },
            "\n\nHuman: a\n\nAssistant:",
        ),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant:yes", "rejected": "\n\nHuman: a\n\nAssistant:no"},
            "\n\nHuman: a\n\nAssistant:",
        ),
    ],
    ids=str,
)
def test_every_shape_of_a_record(record, prompt):
    pair = read_pair(record, "f:1")
    assert (pair.prompt, pair.chosen, pair.rejected, pair.weight, pair.margin) == (prompt, "yes", "no", 1.0, 0.0)


def test_weights_and_margins_are_read():
    pair = read_pair({"prompt": "q", "chosen": "a", "rejected": "b", "weight": 0.5, "margin": -2}, "f:1")
    assert (pair.weight, pair.margin) == (0.5, -2.0)


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ([1], "JSON object"),
        ({"prompt": "q", "chosen": "a"}, "there are prompt, chosen"),
        ({"chosen": "a", "rejected": "b"}, "Assistant"),
        ({"prompt": "q", "chosen": "a", "rejected": "  "}, "not empty in rejected"),
        ({"prompt": "q", "chosen": 3, "rejected": "b"}, "texts"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "a prompt that is text"),
        ({"prompt": [], "chosen": "a", "rejected": "b"}, "a prompt that is text"),
        ({"chosen": [SAY("x"), ASK[1]], "rejected": [SAY("x"), ASK[0]]}, "answers of the assistant"),
        ({"prompt": "q", "chosen": ASK[1], "rejected": "b"}, "answers of the assistant"),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant:x\n\nHuman: thanks", "rejected": "\n\nHuman: a\n\nAssistant:y"},
            "one turn in chosen",
        ),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "weight": -1}, "0 or more"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "margin": "big"}, "a number as margin"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "weight": float("nan")}, "a number as weight"),
        ({"chosen": [*ASK, SAY("a")], "rejected": [ASK[0], SAY("b")]}, "alike up to their last message"),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant:x", "rejected": "\n\nHuman: b\n\nAssistant:y"},
            "alike up to their last",
        ),
    ],
    ids=str,
)
def test_what_is_no_pair_is_told_with_its_line(record, told):
    with pytest.raises(UserError, match="f:7") as caught:
        read_pair(record, "f:7")
    assert told in str(caught.value)


def test_a_dialogue_becomes_messages():
    text = "\n\nHuman: one\n\nAssistant: two\n\nHuman: three\n\nAssistant:"
    roles = [("user", "one"), ("assistant", "two"), ("user", "three")]
    assert [(m["role"], m["content"]) for m in dialogue(text)] == roles
    assert dialogue("plain") == [{"role": "user", "content": "plain"}]


def encoded(records, template=None, **changes):
    config = PairsConfig("data", **{"length": 64, **changes})
    return encode_pairs([(f"f:{i}", record) for i, record in enumerate(records)], config, TOKENIZER, template)


PAIR = {"prompt": "ab", "chosen": "cd", "rejected": "efg"}


def test_without_a_template_answers_follow_the_text_and_end():
    (pair,), _ = encoded([PAIR])
    end = TOKENIZER.end_id
    assert pair.prompt.tolist() == [*TOKENIZER.begin_ids, 97, 98]
    assert [answer.tolist() for answer in pair.answers] == [[99, 100, end], [101, 102, 103, end]]


def letters(*merges):
    """A tokenizer of single letters, of what merges to one token, and of <e>, which ends a turn."""
    vocab = {letter: i for i, letter in enumerate("abcdehisu:\n")}
    vocab |= {"".join(pair): len(vocab) + i for i, pair in enumerate(merges)}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, list(merges)))
    model.add_special_tokens(["<e>"])
    return wrap_tokenizer(model, "<e>", begin_ids=())


def test_with_a_template_prompt_and_answer_are_its_text_cut_where_the_answer_begins():
    tokenizer = letters()
    template = ChatTemplate(TEMPLATE.source, {"eos_token": "<e>"})
    record = {"prompt": ASK, "chosen": " cd ", "rejected": "e"}
    (pair,), _ = encode_pairs([("f", record)], PairsConfig("d"), tokenizer, template)
    spelled = lambda text: tokenizer.encode_batch([text])[0].tolist()
    assert pair.prompt.tolist() == spelled("s:s\nu:hi\na:")
    # The line break after the end of the turn is the template's.
    assert [answer.tolist() for answer in pair.answers] == [
        [*spelled("cd"), tokenizer.end_id], [*spelled("e"), tokenizer.end_id],
    ]  # fmt: skip


def test_tokens_that_would_merge_over_the_border_do_not():
    tokenizer = letters(("a", "b"))
    assert len(tokenizer.encode_batch(["ab"])[0]) == 1
    record = {"prompt": "a", "chosen": "b", "rejected": "ab"}
    pairs, _ = encode_pairs([("f", record)], PairsConfig("d"), tokenizer, None)
    assert pairs[0].prompt.tolist() == [0]
    assert [answer.tolist() for answer in pairs[0].answers] == [[1, tokenizer.end_id], [11, tokenizer.end_id]]


def test_equal_answers_and_what_is_no_pair_are_dropped_and_counted():
    same, broken = {**PAIR, "rejected": "cd "}, {**PAIR, "chosen": ""}
    pairs, counts = encoded([PAIR, same, broken, {"x": 1}], invalid="drop")
    assert len(pairs) == counts["pairs"] == 1
    assert (counts["dropped_equal"], counts["dropped_invalid"]) == (1, 2)
    with pytest.raises(UserError, match="f:1"):
        encoded([PAIR, broken])
    with pytest.raises(UserError, match="at least one pair"):
        encoded([same])


def test_a_chat_needs_a_template():
    with pytest.raises(UserError, match="--template"):
        encoded([{"prompt": ASK, "chosen": "a", "rejected": "b"}])


def test_a_long_prompt_loses_its_beginning_and_no_answer_a_token():
    pairs, counts = encoded([{"prompt": "0123456789" * 9, "chosen": "cd", "rejected": "efg"}])
    (pair,) = pairs
    assert counts["cut_prompts"] == 1
    assert len(pair.prompt) == 64 - 3 - 4
    assert TOKENIZER.decode(pair.prompt.tolist()).endswith("0123456789")
    apart, _ = encoded([{"prompt": "0123456789" * 9, "chosen": "cd", "rejected": "efg"}], layout="apart")
    assert len(apart[0].prompt) == (64 - 3 - 4) // 2


@pytest.mark.parametrize("sizes", [(70, 2), (2, 70), (40, 40), (90, 20)], ids=str)
def test_answers_that_do_not_fit_are_dropped_or_cut_and_counted(sizes):
    long = {"prompt": "q", "chosen": "c" * sizes[0], "rejected": "d" * sizes[1]}
    pairs, counts = encoded([PAIR, long])
    assert (len(pairs), counts["dropped_long"], counts["cut_answers"]) == (1, 1, 0)
    pairs, counts = encoded([long], too_long="truncate")
    assert counts["cut_answers"] == 1
    found = [len(answer) for answer in pairs[0].answers]
    assert sum(found) <= 63
    # What the shorter one leaves is the longer one's.
    assert sum(found) >= min(62, min(sizes) + 1 + 31)
    assert found[0] == sizes[0] + 1 or found[0] >= 31
    assert found[1] == sizes[1] + 1 or found[1] >= 31


def test_answers_that_are_alike_once_cut_are_dropped():
    long = {"prompt": "q", "chosen": "c" * 80 + "x", "rejected": "c" * 80 + "y"}
    pairs, counts = encoded([PAIR, long], too_long="truncate")
    assert (len(pairs), counts["dropped_long"]) == (1, 1)


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_held_out_pairs_share_no_prompt_with_the_others(tmp_path):
    records = [{"prompt": f"q{i % 40}", "chosen": f"a{i}", "rejected": f"b{i}"} for i in range(200)]
    write(tmp_path / "pairs.jsonl", records)
    config = PairsConfig(str(tmp_path / "pairs.jsonl"), heldout_percent=30, length=64)
    data = read_pairs(config, TOKENIZER, None)
    asked = [{pair.prompt.tobytes() for pair in rows.pairs} for rows in (data.train, data.heldout)]
    assert not asked[0] & asked[1]
    assert len(data.train.pairs) + len(data.heldout.pairs) == 200
    assert len(data.heldout.pairs) % 5 == 0
    assert prompt_key(records[0]) == prompt_key(records[40])


def test_rows_hold_every_pair_once_and_nothing_else():
    pairs = random_pairs(40, seed=1, longest=6)
    for shared in (True, False):
        rows = lay_out_pairs(pairs, 24, shared=shared)
        assert sorted(i for row in range(rows.rows) for i in rows.pairs_of(row)) == list(range(40))
        batch = preferences_of(rows, range(rows.rows), rows.rows + 2)
        answers = batch.answers
        assert (batch.weights_BP > 0).sum() == 40
        assert not answers.segments_BT[-2:].any()
        used = sum(len(p.prompt) * (1 if shared else 2) + sum(map(len, p.answers)) for p in pairs)
        assert (answers.segments_BT > 0).sum() == used
        for b in range(rows.rows):
            for p, i in enumerate(rows.pairs_of(b)):
                assert batch.weights_BP[b, p] == pairs[i].weight
                for side in (0, 1):
                    labels = answers.labels_BA[b][answers.answers_BA[b] == 2 * p + side + 1]
                    assert labels.tolist() == pairs[i].answers[side].tolist()
                    places = answers.places_BA[b][answers.answers_BA[b] == 2 * p + side + 1]
                    before = [pairs[i].prompt[-1], *pairs[i].answers[side][:-1]]
                    assert answers.tokens_BT[b][places].tolist() == before
                    end = answers.ends_BS[b, 2 * p + side]
                    assert answers.tokens_BT[b, end] == pairs[i].answers[side][-1]
                    assert answers.positions_BT[b, end] == len(pairs[i].prompt) + len(pairs[i].answers[side]) - 1


def test_a_stream_is_the_same_on_any_number_of_hosts_and_from_any_step():
    rows = lay_out_pairs(random_pairs(60, seed=2), 24)
    config = PairsConfig("d", length=24, batch_size=4)
    whole = pairs_stream(rows, config)
    parts = [pairs_stream(rows, config, host=host, hosts=2) for host in (0, 1)]
    for step in (0, 3, 17):
        halves = [part.batch_at(step).answers.tokens_BT for part in parts]
        assert np.array_equal(whole.batch_at(step).answers.tokens_BT, np.concatenate(halves))
    later = next(iter(whole.batches(17, 18)))
    assert np.array_equal(later.answers.tokens_BT, whole.batch_at(17).answers.tokens_BT)
    # Rows come once in an epoch, and in another order in the next.
    one_at_a_time = pairs_stream(rows, PairsConfig("d", length=24, batch_size=1))
    steps = range(rows.rows), range(rows.rows, 2 * rows.rows)
    first, second = ([name for step in epoch for name in one_at_a_time.documents_at(step)] for epoch in steps)
    assert sorted(first) == sorted(second) == sorted(pair.where for pair in rows.pairs)
    assert first != second
    with pytest.raises(UserError, match="multiple of the number of hosts"):
        pairs_stream(rows, config, hosts=3)


def test_one_pass_over_held_out_pairs_meets_each_once():
    rows = lay_out_pairs(random_pairs(21, seed=2), 24)
    batches = list(pairs_once(rows, PairsConfig("d", length=24, batch_size=4)))
    assert len(batches) == -(-rows.rows // 4)
    assert sum(int((batch.weights_BP > 0).sum()) for batch in batches) == 21
