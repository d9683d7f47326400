"""The command line: from words to a command, and from an outcome to an exit code."""

import argparse
import contextlib
import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import tyro

from lmlab.commands import COMMANDS, Grow, Order, Plan, Report, Run
from lmlab.core.errors import UserError
from lmlab.recipe import load_recipe


def usage() -> str:
    """What `lmlab --help` prints."""
    lines = [f"  {name:11s} {(kind.__doc__ or '').splitlines()[0]}" for name, (kind, _) in COMMANDS.items()]
    return "\n".join(
        ["usage: lmlab COMMAND ...", "", "Language-model research in JAX as pure functions that compose.", "",
         "commands:", *lines, "", "lmlab COMMAND --help tells its options; lmlab run RECIPE --help those of a recipe."]
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code, see `exit_code`."""
    words = list(sys.argv[1:] if argv is None else argv)
    return exit_code(lambda: _dispatch(words))


def exit_code(command: Callable[[], int], name: str = "lmlab") -> int:
    """What the command returns, or 2: input that cannot be used, 130: interrupted, 141: nobody reads the output."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a model may write what the terminal has no letters for
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = command()
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted; run the same command again", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output has left; Python would complain again at exit.
        with contextlib.suppress(OSError):
            sys.stdout = None
        return 141


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0
    if words[0] not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(words[0], COMMANDS, n=1)
        hint = f"Did you mean {near[0]}?" if near else "See lmlab --help."
        raise UserError("command", words[0], f"one of {', '.join(COMMANDS)}", hint)
    kind, command = COMMANDS[words[0]]
    args = _parse(kind, words, _default(kind, words))
    if kind is not Report:
        from lmlab.core.runtime import prepare

        prepare()
    return command(args)


def _default(kind: type[Any], words: list[str]) -> Any:
    """The options of a command with the recipe that they name, if they name one."""
    if kind in (Run, Order, Plan) and len(words) > 1 and not words[1].startswith("-"):
        return kind(words[1], config=load_recipe(words[1])[1])
    if kind is Grow:
        known = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        known.add_argument("--to")
        if to := known.parse_known_args(words)[0].to:
            return Grow(tyro.MISSING, to, config=load_recipe(to)[1])
    return None


def _parse(kind: type[Any], words: list[str], default: Any) -> Any:
    options = {} if default is None else {"default": default}
    parsed = tyro.cli(kind, prog=f"lmlab {words[0]}", args=words[1:], config=(tyro.conf.AvoidSubcommands,), **options)
    return replace(parsed)


if __name__ == "__main__":
    sys.exit(main())
