"""The one exception that means "the input is wrong", as against "the program is"."""


class UserError(Exception):
    """Input that lmlab cannot use: which field, its value, what was expected, what to do.

    The command line prints the message without a traceback and exits with 2. Not a ValueError: libraries that call
    our constructors (tyro) catch those and wrap them in text of their own.
    """

    def __init__(self, field: str, value: object, expected: str, remedy: str = "") -> None:
        self.field, self.value, self.expected, self.remedy = field, value, expected, remedy
        text = f"{field} = {value!r}: expected {expected}."
        super().__init__(f"{text} {remedy}" if remedy else text)


def check(condition: bool, field: str, value: object, expected: str, remedy: str = "") -> None:
    """Raise `UserError` unless `condition` holds. For configs and data; never inside jitted code."""
    if not condition:
        raise UserError(field, value, expected, remedy)


def check_text(field: str, value: str) -> None:
    """Raise `UserError` for words of the command line that are not UTF-8: their bytes arrive as surrogates."""
    check(not any("\ud800" <= letter <= "\udfff" for letter in value), field, value, "text in UTF-8")
