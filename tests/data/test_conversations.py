"""Conversations of every shape, labels on the answers alone, what is cut and dropped, and faults by file and line."""

import json
from collections import Counter

import numpy as np
import pytest
from chat_templates import CHATML, CHATS, MISTRAL, SPECIALS, THINKING, TURN, tiny_tokenizer

from lmlab.core.errors import UserError
from lmlab.data.chat import ChatTemplate
from lmlab.data.config import ConversationsConfig
from lmlab.data.conversations import conversation, encode_conversations, open_conversations
from lmlab.data.tokenizers import byte_tokenizer, wrap_tokenizer

PLAIN = ChatTemplate("{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}", {})
QUESTION, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [QUESTION, ANSWER]},
        {"prompt": "q", "completion": "a"},
        {"prompt": [QUESTION], "completion": [ANSWER]},
        {"instruction": "q", "input": "", "output": "a", "split": "train"},
        {"instruction": "q", "output": "a"},
        {"instruction": "q", "context": "", "response": "a", "category": "x"},
    ],
)
def test_every_shape_is_the_same_conversation(record):
    assert conversation(record, "x:1") == [QUESTION, ANSWER]


def test_what_belongs_to_an_instruction_follows_it():
    wanted = [{"role": "user", "content": "q\n\nmore"}, ANSWER]
    assert conversation({"instruction": "q", "input": "more", "output": "a"}, "x:1") == wanted
    assert conversation({"instruction": "q", "context": "more", "response": "a"}, "x:1") == wanted


WRONG = [
    ([1], "a JSON object, not list"),
    ({"text": "a"}, "record with messages, or with prompt and completion.* there are text"),
    ({"messages": "a"}, "list of {role, content}"),
    ({"messages": ["a"]}, "list of {role, content}"),
    ({"messages": []}, "message of the assistant"),
    ({"messages": [QUESTION]}, "message of the assistant"),
    ({"messages": [QUESTION, {"role": "human", "content": "a"}]}, "message 2 has 'human'"),
    ({"messages": [{"role": "assistant", "content": None}]}, "content of message 1, not NoneType"),
    ({"prompt": 1, "completion": "a"}, "text in prompt"),
    ({"prompt": "q", "completion": 1}, "content of message 2, not int"),
    ({"instruction": "q", "input": ["x"], "output": "a"}, "text in instruction and input"),
]


@pytest.mark.parametrize(("record", "message"), WRONG)
def test_what_is_no_conversation_is_named_by_line(record, message):
    with pytest.raises(UserError, match=rf"'x:7': expected .*{message}".replace("{r", r"\{r")):
        conversation(record, "x:7")


def encode(records, template=PLAIN, tokenizer=None, **settings):
    config = ConversationsConfig("x", **{"length": 40, "batch_size": 2, **settings})
    pairs = [(f"x:{i}", record) for i, record in enumerate(records, start=1)]
    return encode_conversations(pairs, config, tokenizer or byte_tokenizer(), template)


def test_lines_that_are_no_conversations_are_dropped_and_counted_when_asked(capsys):
    records = [record for record, _ in WRONG] + [{"prompt": "q", "completion": "a"}]
    cache, counts = encode(records, invalid="drop")
    assert (cache.documents, counts["conversations"], counts["dropped_invalid"]) == (1, 1, len(WRONG))
    assert cache.document_id(0) == f"x:{len(records)}"
    assert f"{len(WRONG)} dropped as invalid" in capsys.readouterr().err


def test_what_is_longer_than_a_row_is_cut_or_dropped():
    # Rows read 40 and predict one more: "u:" + question + "\na:" + answer + "\n".
    fits, long, no_answer = ((q * "q", a * "a") for q, a in ((10, 25), (10, 26), (50, 5)))
    records = [{"prompt": q, "completion": a} for q, a in (fits, long, no_answer)]
    cache, counts = encode(records)
    assert np.diff(cache.offsets).tolist() == [41, 41]
    assert [counts[name] for name in ("conversations", "truncated", "dropped_long")] == [2, 1, 1]
    cache, counts = encode(records, too_long="drop")
    assert [counts[name] for name in ("conversations", "truncated", "dropped_long")] == [1, 0, 2]


def test_only_what_the_assistant_wrote_is_a_label(tmp_path):
    tokenizer = wrap_tokenizer(tiny_tokenizer(), "</s>")
    lines = [{"messages": [*TURN, {"role": "user", "content": f"and {i}?"}, {"role": "assistant", "content": f"{i}!"}]}
             for i in range(40)]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = ConversationsConfig(str(tmp_path / "a.jsonl"), length=250, batch_size=2, heldout_percent=20)
    data = open_conversations(config, tokenizer, ChatTemplate(CHATML, SPECIALS))
    model, seen = tiny_tokenizer(), Counter()
    rows = [batch for step in range(data.train.rows // 2) for batch in [data.train.batch_at(step)]]
    for batch in [*rows, *data.heldout()]:
        for tokens_T, mask_T in zip(batch.tokens_BT, batch.label_mask_BT, strict=True):
            written = model.decode(tokens_T[mask_T].tolist(), skip_special_tokens=False)
            seen.update(part for part in written.split("<|im_end|>") if part)
    kept = data.summary["conversations/train/conversations"] + data.summary["conversations/heldout/conversations"]
    assert kept == 40
    assert seen["Hello! 2+2 = 4"] >= 39 - 2 * (data.train.rows % 2)
    assert set(seen) <= {"Hello! 2+2 = 4", *(f"{i}!" for i in range(40))}
    both = [set(data.texts(split)) for split in ("train", "heldout")]
    assert len(both[0] | both[1]) == 40
    assert not both[0] & both[1]


def test_the_last_answer_alone():
    chat = {"messages": [QUESTION, ANSWER, QUESTION, {"role": "assistant", "content": "last"}]}
    cache, _ = encode([chat], turns="last")
    assert bytes(cache.tokens_N[cache.labels_N].tolist()) == b"a:last\n"
    cache, _ = encode([chat])
    assert bytes(cache.tokens_N[cache.labels_N].tolist()) == b"a:a\na:last\n"


def test_the_date_is_the_configs():
    dated = ChatTemplate("{{ strftime_now('%d %b %Y') }}" + PLAIN.source, {})
    chat = {"prompt": "q", "completion": "a"}
    (one, _), (other, _) = encode([chat], dated), encode([chat], dated, date="2031-01-02")
    assert [bytes(cache.tokens_N[:11].tolist()) for cache in (one, other)] == [b"26 Jul 2024", b"02 Jan 2031"]
    with pytest.raises(UserError, match=r"data.date = 'soon'"):
        ConversationsConfig("x", date="soon")


def test_templates_that_fail_name_the_line():
    alternate = {"messages": [QUESTION, QUESTION, ANSWER]}
    with pytest.raises(UserError, match=r"chat_template for x:2 = .*roles must alternate"):
        encode([{"messages": TURN}, alternate], ChatTemplate(MISTRAL, SPECIALS))
    _, counts = encode([{"messages": TURN}, alternate], ChatTemplate(MISTRAL, SPECIALS), invalid="drop")
    assert counts["dropped_invalid"] == 1
    thoughts = {"messages": [QUESTION, {"role": "assistant", "content": "<think>b</think>a"}] * 2}
    with pytest.raises(UserError, match=r"chat_template for x:1 = .*turns = \"last\""):
        encode([thoughts], ChatTemplate(THINKING, SPECIALS), length=200)


def test_faults_of_files(write_jsonl, tmp_path):
    def load(path, **settings):
        return open_conversations(ConversationsConfig(str(path), **settings), byte_tokenizer(), PLAIN)

    with pytest.raises(UserError, match="at least one file"):
        load(tmp_path / "none.jsonl")
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match=r"a.txt.*a .jsonl or .jsonl.gz file"):
        load(tmp_path / "a.txt")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(
        UserError, match=r"empty.jsonl.*at least one answer to learn in train.*There is no conversation"
    ):
        load(tmp_path / "empty.jsonl")
    path = write_jsonl("a.jsonl", [{"messages": CHATS["one"]}, {"messages": CHATS["open"]}])
    with pytest.raises(UserError, match=r"'a.jsonl:2': expected a message of the assistant"):
        load(path, heldout_percent=1)
    path.write_text('{"messages": [}\n')
    with pytest.raises(UserError, match=r"'a.jsonl:1': expected a line of JSON"):
        load(path)
    few = write_jsonl("few.jsonl", [{"prompt": "q", "completion": "a" * 50}])
    with pytest.raises(UserError, match=r"1 conversations were dropped"):
        load(few, length=20, too_long="drop", heldout_percent=1)


def test_named_heldout_files(write_jsonl):
    train = write_jsonl("train.jsonl", [{"prompt": str(i), "completion": "a"} for i in range(9)])
    heldout = write_jsonl("heldout.jsonl", [{"prompt": "h", "completion": "b"}])
    config = ConversationsConfig(str(train), str(heldout), length=30, batch_size=1)
    data = open_conversations(config, byte_tokenizer(), PLAIN)
    assert data.summary["conversations/train/conversations"] == 9
    assert list(data.texts("heldout")) == ["u:h\na:b\n"]
