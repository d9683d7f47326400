"""What `lmlab label-noise` does. JAX is imported inside, so that help is there at once."""

from pathlib import Path

from lmlab.core.errors import check
from lmlab.label_noise.config import LabelNoise
from lmlab.recipe import RUNS


def label_noise(args: LabelNoise) -> int:
    """Read, score, write, and print the summary."""
    from lmlab.label_noise.clean import REPORT, STRENGTH, write_all
    from lmlab.label_noise.features import read_features
    from lmlab.label_noise.read import group_pairs, read_file
    from lmlab.label_noise.scores import judge
    from lmlab.report.folder import open_folder, writing

    source = Path(args.data)
    named = args.data.endswith((".jsonl", ".jsonl.gz"))
    check(source.is_file() and named, "DATA", args.data, "a file .jsonl or .jsonl.gz that is there")
    check(not args.model or Path(args.model).exists(), "--model", args.model, "a model that is there")
    folder = (
        Path(args.out) if args.out else RUNS / f"{source.name.removesuffix('.gz').removesuffix('.jsonl')}-label-noise"
    )
    target = folder / f"cleaned.jsonl{'.gz' if source.name.endswith('.gz') else ''}"
    for path in (target, folder / STRENGTH, folder / REPORT):
        check(path.resolve() != source.resolve(), "--out", str(folder), "a folder other than that of the input",
              f"{path.name} is written there, and an input is never overwritten.")  # fmt: skip
    found = read_file(source, args.invalid)
    groups_N = group_pairs(found.pairs)
    groups = int(groups_N.max()) + 1
    check(groups >= args.folds, "DATA", args.data, f"at least {args.folds} prompts, as many as --folds",
          f"There are {groups}; pairs of one prompt stay in one fold.")  # fmt: skip
    open_folder(folder)
    verdict = judge(read_features(found.pairs, args), groups_N, args)
    with writing(folder):
        say(write_all(found, verdict, args, target))
    return 0


def say(text: str) -> None:
    """The summary on standard output."""
    print(text)
