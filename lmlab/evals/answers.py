r"""Final answers of worked solutions: found in the text, read as numbers, compared.

Conventions: GSM8K's `#### 72` (arXiv 2110.14168), MATH's `\boxed{}` (arXiv 2103.03874), `A: 72`, "The answer is 72.",
and else the last number of the text.
"""

import re
from fractions import Fraction

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(rf"(?<![\w.])(?:(?<![)\]])-\s?)?\$?-?(?:{_DIGITS})(?:\s\d+/\d+|\s?/\s?\d+(?![\d.]))?%?")
"""A number in running text: commas, a dollar or a percent sign, a fraction, a mixed number. The hyphen of 10-5 is no
sign."""
_GSM8K = re.compile(r"####[ \t]*([^\n]*)")
_SAID = re.compile(r"(?:^\s*A(?:nswer)?\s*:|answer\s+is\s*:?)\s*(?=([^\n]+))", re.MULTILINE | re.IGNORECASE)


def final_answer(text: str) -> str:
    r"""The answer that a solution ends in, as it is written; empty if it has none.

    The first of these that the text has: after the first `####`, in the last `\boxed{}`, the sentence after the last
    `A:` (or `Answer:`) that begins a line or the last "answer is", whichever is later, the last number.
    """
    numbers = _NUMBER.findall(text.replace("\u2212", "-"))
    return _marked_answer(text) or (numbers[-1].strip() if numbers else "")


def same_answer(answer: str, gold: str) -> bool:
    """Whether two answers are equal as numbers, or else as text after `normalise`. Nothing equals an empty answer."""
    one, other = read_number(answer), read_number(gold)
    if one is not None and other is not None:
        return one == other
    return bool(answer.strip()) and _letters(answer) == _letters(gold)


def solves(text: str, gold: str) -> bool:
    """Whether a solution ends in the answer that a reference solution marks, or in the bare answer `gold`."""
    return same_answer(final_answer(text), _marked_answer(gold) or gold)


def normalise(answer: str) -> str:
    r"""An answer without what does not change it: LaTeX's spacing and sizes, `\text{}`, dollars, `x =`, a last stop."""
    text = answer.strip().replace("\u2212", "-").replace("\\$", "$").replace("\\%", "%")
    text = re.sub(r"\\!\s*", "", text)
    text = re.sub(r"\\[()\[\],;: ]|\\(?:left|right|displaystyle|quad)(?![a-zA-Z])|~", " ", text)
    text = re.sub(r"\\(?:text|textbf|mathrm|mbox|boxed)\s*\{([^{}]*)\}", r" \1 ", text)
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?|\\degree|°", " ", text)
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    # \frac12 and \frac1{2} are \frac{1}{2}.
    text = re.sub(r"\\frac\s*(\d)", r"\\frac{\1}", text)
    text = re.sub(r"\\frac\s*(\{[^{}]*\})\s*(\d)", r"\\frac\1{\2}", text)
    text = re.sub(r"\\sqrt\s*(\w)", r"\\sqrt{\1}", text)
    text = re.sub(r"(?<=\d)\s*\\frac\{(\d+)\}\{(\d+)\}", r" \1/\2", text)
    text = re.sub(r"\\frac\{(-?\d+)\}\{(-?\d+)\}", r"\1/\2", text)
    text = text.replace("$", "").strip().rstrip(".").strip("*_ ")
    text = re.sub(r"^[a-zA-Z]\s*(?:=|\\in(?![a-zA-Z]))\s*", "", text)
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    return " ".join(text.split())


def read_number(answer: str) -> Fraction | None:
    r"""The number that an answer is, exactly: 1,200, $7.00, 50%, 3/4, 1 1/2, \frac{3}{4}, -2, 12 apples.

    Words may stand around it, other numbers and formulas may not; of a calculation what follows its last equals sign
    counts. A percent sign is a unit. None if the answer is not a number.
    """
    text = normalise(answer)
    left, equals, right = text.rpartition("=")
    if equals and not re.search(r"[a-zA-Z]", re.sub(r"\\[a-zA-Z]+", "", left)):
        text = right.strip()
    # Square inches.
    text = re.sub(r"(?<![\\a-zA-Z])([a-zA-Z]{2,})\s*\^\s*(?:\d|\{\d\})$", r"\1", text)
    found = list(_NUMBER.finditer(text))
    if len(found) != 1:
        return None
    before, after = text[: found[0].start()], text[found[0].end() :]
    # One letter at a number is a variable (2x); several are a unit (2km), as is a word of its own.
    if re.match(r"[a-zA-Z](?![a-zA-Z])", after) or re.search(r"[\\^_{}+*/=<>()\[\]\d]", before + after):
        return None
    return _value(found[0].group())


def _value(number: str) -> Fraction | None:
    text = re.sub(r"[,$%]", "", number).replace("- ", "-")
    sign = -1 if text.startswith("-") else 1
    whole, slash, below = text.lstrip("-").partition("/")
    if slash and int(below) == 0:
        return None
    parts = [Fraction(part) for part in whole.split()]
    if not slash:
        return sign * parts[0]
    last = parts[-1] / int(below)
    return sign * (parts[0] + last if len(parts) == 2 else last)


def _letters(answer: str) -> str:
    return normalise(answer).replace(" ", "").casefold()


def _marked_answer(text: str) -> str:
    """The answer after the mark that counts; empty without one."""
    said = [_sentence(rest) for rest in _SAID.findall(text)]
    for found in (_GSM8K.findall(text)[:1], _boxed(text)[-1:], said[-1:]):
        if found and found[0].strip():
            return found[0].strip()
    return ""


def _sentence(text: str) -> str:
    """A text up to the end of its first sentence: a stop that is no decimal point."""
    return re.split(r"\.(?:\s|$)", text, maxsplit=1)[0]


def _boxed(text: str) -> list[str]:
    r"""What stands in every `\boxed{}`, with braces inside it."""
    found = []
    for match in re.finditer(r"\\f?boxed\s*\{", text):
        depth, start = 1, match.end()
        for i in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[i], 0)
            if depth == 0:
                found.append(text[start:i])
                break
    return found
