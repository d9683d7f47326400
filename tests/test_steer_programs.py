"""Programs that `lmlab steer` knows by name: their texts obey, and arguments that cannot be used are told of."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from tiny_run import one_line

from lmlab.cli import main
from lmlab.data.tokenizers import byte_tokenizer
from lmlab.steering.programs import Setting, find_program

WORDS = ["steer", "out", "--tokens", "6", "--particles", "12", "--threshold", "0", "--out", "s"]


@pytest.mark.parametrize(
    ("program", "pattern"),
    [
        ("words:2", r"(?!.*[A-Za-z]{3})(?![A-Za-z]{2}).*"),
        ("forbid:a,bc,\x00", r"[^a\x00]*"),
        ("vocabulary:words.txt", r"(^|(on)?[^a-z]+)((on|if)([^a-z]+|$))*(i|o)?"),
        ("regex:[ab]{2,3}c", r"[ab]{2,3}c"),
        ("json:schema.json", r"true|false|[0-9]+"),
        ("lark:grammar.lark", r"(ab)+"),
    ],
)
def test_texts_obey(place, program, pattern):
    Path("words.txt").write_text("on\nif\n")
    Path("schema.json").write_text('{"type": ["boolean", "integer"], "minimum": 0}')
    Path("grammar.lark").write_text('start: "ab" start?')
    whole = program.startswith(("regex", "json", "lark"))
    unfinished = "drop" if whole else "keep"
    assert main([*WORDS, "--prompt", "a x", "--program", program, "--unfinished", unfinished]) == 0
    trace = json.loads((place / "s/trace.json").read_text())
    assert len(trace["posterior"]) > 1
    # The model is hardly trained, and its bytes need not be UTF-8.
    assert [one["text"] for one in trace["posterior"] if not re.fullmatch(pattern, one["text"], re.DOTALL)] == []
    assert trace["log_evidence"] < 0
    if whole:
        assert all(one["finished"] for one in trace["posterior"])


def test_gaps_are_filled(place):
    words = ["--tokens", "16", "--prompt", "ab", "--program", "infill:A___ B____.", "--unfinished", "drop"]
    assert main([*WORDS, *words]) == 0
    trace = json.loads((place / "s/trace.json").read_text())
    assert [one["text"] for one in trace["posterior"] if not re.fullmatch(r"A.+ B.+\.", one["text"], re.DOTALL)] == []


def test_prompts_are_intersected_and_texts_lean_to_a_class(place, capsys):
    assert main([*WORDS, "--prompt", "ab", "b", "--program", "intersect"]) == 0
    assert json.loads((place / "s/trace.json").read_text())["log_evidence"] < -1
    Path("some.txt").write_text("aaa\n\nb\n")
    assert main([*WORDS, "--prompt", "ab", "--program", "class:some.txt,some.txt"]) == 0
    # Where nothing tells the two apart every text is as probable to be of either.
    evidence = json.loads((place / "s/trace.json").read_text())["log_evidence"]
    assert evidence == pytest.approx(np.log(0.5), abs=1e-5)
    capsys.readouterr()
    assert main([*WORDS, "--prompt", "ab", "--program", "intersect"]) == 2
    assert "at least 2 prompts" in one_line(capsys)


def test_a_model_may_have_more_numbers_than_its_tokenizer_has_tokens():
    codec = byte_tokenizer()
    program = find_program("words:3", 0.5)(Setting(codec, ("",), 8, codec.vocab_size + 7))
    assert program.temperature == 0.5
    assert program.tables["next_QV"].shape[1] == codec.vocab_size + 7
    assert (np.asarray(program.tables["next_QV"])[:, codec.vocab_size :] == -1).all()


RUDE = [
    ("fre", ("--program", "Did you mean free?", "Ready: ", "words:LETTERS")),
    ("free:x", ("--program", "no argument")),
    ("words", ("--program", "words:LETTERS")),
    ("words:", ("--program", "words:LETTERS")),
    ("words:none", ("--program", "at least 1")),
    ("words:0", ("--program", "at least 1")),
    ("forbid:a,", ("texts", "not empty")),
    ("vocabulary:absent.txt", ("--program", "absent.txt", "UTF-8")),
    ("vocabulary:bytes.txt", ("--program", "bytes.txt", "UTF-8")),
    ("vocabulary:empty.txt", ("words", "at least one")),
    ("vocabulary:signs.txt", ("words", "separators")),
    ("json:absent.json", ("--program", "absent.json", "UTF-8")),
    ("json:empty.txt", ("schema", "JSON")),
    ("lark:signs.txt", ("grammar", "llguidance")),
    ("infill:no gap", ("--program", "___")),
    ("infill:a ___ ___ b", ("--program", "between two gaps")),
    ("infill:long ___ text.", ("tokens", "at least 13")),
    ("class:empty.txt", ("--program", "class:LIKE.txt,UNLIKE.txt")),
    ("class:signs.txt,empty.txt", ("outside", "at least one text")),
    ("regex:(a", ("pattern", "regular expression")),
    ("regex:a{40}", ("constraint", "at most 6 tokens")),
]


@pytest.mark.parametrize(("program", "said"), RUDE)
def test_arguments_that_cannot_be_used(place, capsys, program, said):
    for name, content in {"bytes": b"\xff\xfe", "empty": b" \n", "signs": b"a-b"}.items():
        (place / f"{name}.txt").write_bytes(content)
    assert main([*WORDS, "--program", program]) == 2
    line = one_line(capsys)
    assert [part for part in said if part not in line] == []
    assert not (place / "s").exists() or not os.listdir(place / "s")
