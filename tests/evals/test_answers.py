"""Answers are found where solutions put them, and compared as numbers where they are numbers."""

import gzip
import itertools
import json
from fractions import Fraction
from pathlib import Path

import pytest

from lmlab.evals.answers import final_answer, normalise, read_number, same_answer, solves

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "math"

FOUND = [
    ("She has 3 + 4 = 7.\n#### 7", "7"),
    ("#### 5\nQuestion: next\n#### 6", "5"),
    ("a\n####  -1,200 \nb", "-1,200"),
    (r"so \boxed{1} and then $\boxed{\frac{3}{4}}$ of 9", r"\frac{3}{4}"),
    (r"\boxed{\text{a {nested} one}}.", r"\text{a {nested} one}"),
    (r"\boxed{unclosed 8", "8"),
    ("1 + 1 = 2\nA: 18", "18"),
    ("Answer: $1,000 per day.\nThat is 5.", "$1,000 per day"),
    ("The answer is 3.5. Is it 9?", "3.5"),
    ("The final answer is: 12 apples.", "12 apples"),
    ("A: She has 8 eggs. So the answer is 6.", "6"),
    ("the answer is 3\nA: 5", "5"),
    ("It takes 3 hours, so 1,234.50 in all, not less.", "1,234.50"),
    ("it is 10-5", "5"),
    ("it is \u22123 or so", "-3"),
    ("####", ""),
    ("none", ""),
    ("", ""),
]
NUMBERS = [
    ("7", 7), ("7.0", 7), ("7.", 7), (".5", Fraction(1, 2)), ("-2", -2), ("\u22122", -2), ("$5", 5), ("-$5", -5),
    ("$-5", -5), (r"\$18.90", Fraction(189, 10)), ("1,234,567", 1234567), (r"10,\!080", 10080), ("50%", 50),
    (r"50\%", 50), ("3/4", Fraction(3, 4)), ("1 1/2", Fraction(3, 2)), ("-1 1/2", Fraction(-3, 2)),
    (r"\frac{3}{4}", Fraction(3, 4)), (r"-\dfrac{3}{4}", Fraction(-3, 4)), (r"\frac34", Fraction(3, 4)),
    (r"\frac{270}7\text{ degrees}", Fraction(270, 7)), (r"1\frac{4}{5}", Fraction(9, 5)), (r"90^\circ", 90),
    ("12 apples", 12), ("about 12 apples", 12), ("5km", 5), (r"15\mbox{ cm}^2", 15), ("x = 5", 5),
    ("5 + 3 = 8", 8), (r"$5 \times 3 = 15$", 15), ("**18**", 18), (r"\left( 3 \right)", None), ("2x", None),
    ("y = 2x + 3", None), ("5x - 7y + 4 = 0", None), ("1,2", None), ("2:30", None), ("3 and 4", None), ("1/0", None),
    (r"3\sqrt{2}", None), (r"\pi", None), ("", None), ("ten", None), ("2^3", None), ("52_8", None),
]  # fmt: skip


@pytest.mark.parametrize(("text", "answer"), FOUND)
def test_the_answer_is_found(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(("text", "value"), NUMBERS)
def test_numbers_are_read_exactly(text, value):
    assert read_number(text) == value


def test_answers_that_are_no_numbers_are_compared_as_text():
    for one, other in ((r"\text{Tuesday}", "tuesday."), (r"\left(3, \frac{\pi}{2}\right)", r"(3,\frac{\pi}{2})"),
                       (r"11\sqrt2", r"11 \sqrt{2}"), (r"x \in [-2,7]", "[-2, 7]"),
                       ("2x+3", "y = 2x + 3")):  # fmt: skip
        assert same_answer(one, other)
    for one, other in (("2x", "2"), ("(1,2)", "(2,1)"), ("", ""), ("", "5"), ("7.01", "7"), ("-7", "7"), ("a", "b")):
        assert not same_answer(one, other)
        assert not same_answer(other, one)


def test_a_solution_is_checked_against_a_reference_or_a_bare_answer():
    assert solves("so 36 * 2 = 72.0\nA: 72.0", "He has 2 * 36 = <<2*36=72>>72.\n#### 72")
    assert solves("The answer is $72.", "72")
    assert solves(r"\boxed{\frac{1}{2}}", r"\frac{1}{2}")
    assert not solves("The answer is 27.", "#### 72")
    assert not solves("", "#### 72")
    assert not solves(r"\boxed{14}", r"\frac{14}{3}")


def test_what_is_normalised_stays_so():
    for text, _ in NUMBERS:
        assert normalise(normalise(text)) == normalise(text)


def records(name):
    path = DATA / name
    if not path.is_file():
        pytest.skip(f"needs {name} of the development data")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def test_gsm8k_solutions_are_judged_as_their_authors_judge_them():
    wrong = [
        (name, record["question"])
        for record in records("gsm8k_model_solutions.jsonl.gz")
        for name in ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
        if solves(record[name]["solution"], record["ground_truth"]) != record[name]["is_correct"]
    ]
    assert wrong == []


@pytest.mark.parametrize("name", ["gsm8k_train.jsonl.gz", "gsm8k_test.jsonl.gz"])
def test_every_gsm8k_answer_is_a_number(name):
    assert [record for record in records(name) if read_number(final_answer(record["answer"])) is None] == []


def test_every_math_solution_has_its_own_answer_and_no_other():
    solved = records("math500.jsonl.gz")
    assert all(solves(record["solution"], record["answer"]) for record in solved)
    # With the answer of the next problem: only where the two answers are equal.
    for record, other in itertools.pairwise(solved):
        assert solves(record["solution"], other["answer"]) == same_answer(record["answer"], other["answer"])
