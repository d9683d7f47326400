"""What `lmlab label-noise` does. JAX is imported inside, so that help is there at once."""

from pathlib import Path

from lmlab.core.errors import UserError, check
from lmlab.label_noise.config import LabelNoise
from lmlab.recipe import RUNS


def label_noise(args: LabelNoise) -> int:
    """Read, score, write, and print the summary."""
    from lmlab.label_noise.clean import open_folder, write_all
    from lmlab.label_noise.features import read_features
    from lmlab.label_noise.read import read_file
    from lmlab.label_noise.scores import judge

    source = Path(args.data)
    named = args.data.endswith((".jsonl", ".jsonl.gz"))
    check(source.is_file() and named, "DATA", args.data, "a file .jsonl or .jsonl.gz that is there")
    check(not args.model or Path(args.model).exists(), "--model", args.model, "a model that is there")
    folder = Path(args.out) if args.out else RUNS / f"{source.name.split('.')[0]}-label-noise"
    target = folder / f"cleaned.jsonl{'.gz' if source.name.endswith('.gz') else ''}"
    check(target.resolve() != source.resolve(), "--out", str(folder), "a folder other than that of the input",
          f"{target.name} is written there, and an input is never overwritten.")  # fmt: skip
    found = read_file(source, args.invalid)
    check(len(found.pairs) >= args.folds, "DATA", args.data, f"at least {args.folds} pairs, as many as --folds",
          f"There are {len(found.pairs)}.")  # fmt: skip
    open_folder(folder)
    verdict = judge(read_features(found.pairs, args), args)
    try:
        say(write_all(found, verdict, args, target))
    except OSError as error:
        raise UserError("--out", str(folder), f"a folder that can be written ({error.strerror})") from error
    return 0


def say(text: str) -> None:
    """The summary on standard output."""
    print(text)
