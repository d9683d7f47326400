"""What `lmlab steer` does. JAX is imported inside, so that help is there at once."""

import signal
from functools import partial
from pathlib import Path
from typing import Any

from lmlab.core.errors import check
from lmlab.recipe import RUNS
from lmlab.steering.config import Steer


def steer(args: Steer) -> int:
    """Run, write the folder, print the result. 1: no text is left; 130 or 143: stopped by SIGINT or SIGTERM."""
    from lmlab.inference.text import encode_prompts
    from lmlab.interop.pretrained import tokenizer_of
    from lmlab.loading import load_model
    from lmlab.report.folder import open_folder
    from lmlab.steering.programs import Setting, find_program
    from lmlab.train.folder import is_run
    from lmlab.train.loop import stop_signals

    source = Path(args.model)
    build = find_program(args.program, args.temperature)
    folder = Path(args.out) if args.out else RUNS / f"{source.resolve().name.removesuffix('.gguf')}-steer"
    check(not is_run(folder), "--out", str(folder), "a folder other than that of a run",
          "report.html is written there.")  # fmt: skip
    model = load_model(source, args.dtype)
    codec = tokenizer_of(model)
    prompts = encode_prompts(codec, args.prompt)
    program = build(Setting(codec, args.prompt, args.tokens, model.config.vocab_size))
    open_folder(folder)
    with stop_signals() as asked:  # until the folder is written
        outcome = watched(model, program, codec, prompts, args, asked)
        write(outcome, codec, args, folder)
    if outcome.stopped_by:
        return 128 + signal.Signals[outcome.stopped_by]
    return 0 if outcome.posterior else 1


def driver_of(args: Steer) -> Any:
    """The driver that the options say."""
    from lmlab.inference import resampling
    from lmlab.inference.smc import standard, steering

    if args.method == "steer":
        return steering(args.children)
    return standard(getattr(resampling, args.scheme), args.threshold)


def watched(model: Any, program: Any, codec: Any, prompts: list[Any], args: Steer, asked: list[str]) -> Any:
    """The outcome of all rounds, or of those until a signal is in `asked`; each is shown when it is made."""
    import jax
    import numpy as np

    from lmlab.inference.posterior import particle_texts, written
    from lmlab.inference.smc import only
    from lmlab.inference.texts import infer
    from lmlab.steering.rounds import conclude, read_round
    from lmlab.steering.watch import Watch

    rounds: list[Any] = []
    with Watch(args.tokens) as watch:
        for particles in infer(
            model.lm, model.params, program, prompts, jax.random.key(args.seed), driver_of(args),
            particles=args.particles, tokens=args.tokens, stride=1, stop=lambda: bool(asked),
        ):  # fmt: skip
            rounds.append(read_round(particles, rounds[-1] if rounds else None))
            fine_P = rounds[-1].log_weight_P < np.inf  # which NaN is not either
            check(fine_P.all(), "weights", "NaN or inf", "numbers",
                  "The model's logits, or what the program scores, are none.")  # fmt: skip
            watch.update(len(rounds), rounds[-1], partial(particle_texts, codec, prompts[0], written(particles.state)))
    over = len(rounds) == args.tokens or bool(particles.done_P.all())
    stopped_by = "" if over or not asked else asked[0]
    if args.unfinished == "drop":
        particles = only(particles, written(particles.state).finished_P)
    return conclude(particles, rounds, codec, prompts, list(args.prompt), watch.seconds, stopped_by)


def write(outcome: Any, codec: Any, args: Steer, folder: Path) -> None:
    """The folder, both files or none, then the result on standard output, which may be gone."""
    import jax

    from lmlab.inference.posterior import draw_text
    from lmlab.report.folder import replace_all, writing
    from lmlab.steering.page import render_page
    from lmlab.steering.told import summary
    from lmlab.steering.trace import write_trace

    key = jax.random.fold_in(jax.random.key(args.seed), args.tokens)
    drawn = draw_text(key, outcome.posterior) if outcome.posterior else None
    files = {
        folder / "trace.json": write_trace(outcome, codec, args, drawn).encode(),
        folder / "report.html": render_page(outcome, codec, args).encode(errors="replace"),
    }
    with writing(folder):
        replace_all(files)
    say("\n".join([summary(outcome, args, drawn), "", *(f"{path.name:12s} {path.resolve()}" for path in files)]))


def say(text: str) -> None:
    """The result on standard output."""
    print(text)
