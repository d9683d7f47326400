"""Context distillation (arXiv 2209.15189): what a context does is moved into the weights.

    python -m experiments.context_distillation [--smoke] [--out FOLDER]
    python -m experiments.context_distillation --only chat --model MODEL --prompts PROMPTS.jsonl.gz

Permutations: a small transformer is told by an instruction which of 8 permutations to write; without it, it can only
guess. The instruction's effect is distilled on unlabelled inputs, in eight ways, two of them controls; recovery is
(after - floor) / (ceiling - floor) of the probability of the right answer without the instruction, drift the change of
accuracy on the other tasks with theirs. Then the instructions of four tasks, each into a name: at once and in turn.
Addition: a model that adds with a scratch-pad is taught to answer at once by its own worked answers, against direct
training on as many labels. Chat, if a model with a chat template is named: a system prompt is distilled into adapters.

Prints tables; writes results.json and context_distillation.svg. Expect 6 minutes for the first two parts on two cores.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from experiments.context_distillation_addition import run_addition
from experiments.context_distillation_chat import PERSONA, Chat, run_chat
from experiments.context_distillation_tasks import AT_ONCE, Sizes, run_tasks
from experiments.results import carry_out, deviation
from lmlab.cli import exit_code
from lmlab.core.errors import check
from lmlab.report.plots import drawing

NAME = "python -m experiments.context_distillation"
PARTS = ("tasks", "addition", "chat")
SMOKE = ("top 4", "on-policy 0.5", "control: teacher shuffled", "distilled, soft")
"""Arms of a smoke run: one for each way to train."""


@dataclass(frozen=True)
class Options:
    """Distil instructions, scratch-pads and a system prompt into weights."""

    out: str = "runs/context_distillation"
    """Where results.json and the figure go."""
    only: str = ""
    """tasks, addition or chat: that part alone."""
    smoke: bool = False
    """A few steps, to see that it runs."""
    seeds: int = 3
    """Models of the first two parts, each with parameters and inputs of its own."""
    pretraining: int = 1500
    """Steps in which the model learns all tasks, and to follow instructions."""
    steps: int = 300
    """Of every arm of the permutations; a multiple of 20."""
    inputs: int = 2000
    """Unlabelled inputs to distil on."""
    held_out: int = 256
    """Inputs, and sums, to look at."""
    digits: int = 3
    """Of the numbers that are added, 1 to 4."""
    addition_pretraining: int = 1200
    """Steps in which the model learns to add with a scratch-pad."""
    addition_steps: int = 400
    """Of every arm of the addition; a multiple of 10."""
    labels: int = 2000
    """Sums to distil on, or to be told."""
    model: str = ""
    """A model with a chat template (.gguf, or a folder of transformers); empty: the third part is skipped."""
    prompts: str = ""
    """Of the third part: .jsonl or .jsonl.gz with fields "instruction", "output" and perhaps "input"."""
    persona: str = PERSONA
    """The system prompt to distil."""
    chat_steps: int = 30
    """Of every arm of the third part."""
    chat_prompts: int = 96
    """To distil on; a quarter as many are held out."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        check(self.only in ("", *PARTS), "--only", self.only, " or ".join(PARTS))
        check(self.only != "chat" or bool(self.model), "--model", self.model, "a model with a chat template")
        check(not self.model or Path(self.model).exists(), "--model", self.model, "a file or folder that is there")
        check(not self.model or (Path(self.prompts).is_file()), "--prompts", self.prompts, "a file of prompts")
        for name in ("seeds", "pretraining", "inputs", "held_out", "addition_pretraining", "labels", "chat_steps"):
            check(getattr(self, name) >= 1, f"--{name.replace('_', '-')}", getattr(self, name), "at least 1")
        check(self.chat_prompts >= 8, "--chat-prompts", self.chat_prompts, "at least 8")
        for name, multiple in (("steps", 20), ("addition_steps", 10)):
            value = getattr(self, name)
            check(value >= multiple and value % multiple == 0, f"--{name.replace('_', '-')}", value,
                  f"a multiple of {multiple}")  # fmt: skip
        check(1 <= self.digits <= 4, "--digits", self.digits, "1 to 4")
        enough = self.held_out + self.labels <= 100**self.digits
        check(enough or self.only in ("tasks", "chat") or self.smoke, "--labels", self.labels,
              f"with --held-out at most {100**self.digits}, the sums of {self.digits} digits")  # fmt: skip
        check(bool(self.persona.strip()), "--persona", self.persona, "a system prompt")


def run(options: Options) -> dict[str, Any]:
    """All parts, or the one that is asked for."""
    if options.smoke:
        options = replace(
            options, seeds=2, pretraining=2, steps=20, inputs=40, held_out=8, addition_pretraining=2, addition_steps=10,
            labels=40, chat_steps=2, chat_prompts=8,
        )  # fmt: skip
    asked = [options.only] if options.only else list(PARTS)
    result: dict[str, Any] = {"options": asdict(options)}
    if "tasks" in asked:
        sizes = Sizes(options.seeds, options.pretraining, options.steps, options.inputs, options.held_out)
        if options.smoke:
            sizes = replace(sizes, rows=4, arms=SMOKE)
        result["tasks"] = run_tasks(sizes)
    if "addition" in asked:
        result["addition"] = run_addition(
            options.seeds, options.digits, options.addition_pretraining, options.addition_steps, options.labels,
            options.held_out, some=SMOKE if options.smoke else (),
        )  # fmt: skip
    if "chat" in asked and not options.model:
        result["chat"] = {"skipped": "no model was named (--model, --prompts)"}
    elif "chat" in asked:
        result["chat"] = run_chat(Chat(options.model, options.prompts, options.persona, options.chat_steps,
                                       options.chat_prompts, max(4, options.chat_prompts // 4)))  # fmt: skip
    return result


def show(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds."""
    return f"{np.mean(values):.3f} ±{deviation(values):.3f}"


def table(result: dict[str, Any]) -> str:
    """All that was found, as text."""
    lines = []
    if "tasks" in result:
        lines += tasks_table(result["tasks"])
    if "addition" in result:
        part = result["addition"]
        told = show(part["teacher"])
        lines += ["", f"addition of {part['digits']} digits, {part['labels']} sums; with a scratch-pad {told}",
                  f"{'right at once, held out':38s}{'before':>15s}{'after':>15s}"]  # fmt: skip
        for name, arm in part["arms"].items():
            lines.append(f"{name:38s}{show(arm['at once'][0]):>15s}{show(arm['at once'][-1]):>15s}")
    chat = result.get("chat", {})
    if "skipped" in chat:
        lines += ["", f"chat: skipped, {chat['skipped']}"]
    elif chat:
        lines += ["", f"{chat['model']}: {chat['persona']}", f"nats a token of its answers: with the prompt "
                      f"{chat['ceiling']:.3f}, without {chat['floor']['nll']:.3f}",
                  f"{'after':26s}{'nats a token':>14s}{'recovery':>10s}{'KL':>8s}{'other answers':>15s}",
                  f"{'before':26s}{chat['floor']['nll']:14.3f}{0:10.3f}{chat['floor']['kl']:8.3f}"
                  f"{chat['floor']['drift']:15.3f}"]  # fmt: skip
        for name, arm in chat["arms"].items():
            lines.append(f"{name:26s}{arm['nll']:14.3f}{arm['recovery']:10.3f}{arm['kl']:8.3f}{arm['drift']:15.3f}")
    return "\n".join(lines)


def tasks_table(part: dict[str, Any]) -> list[str]:
    """Arms on one task, and four tasks into names."""
    start = part["start"]
    without, told = show(start["without"]), show(start["with"])
    lines = [f"permutations, probability of the right answer: without instruction {without}, with it {told}",
             f"{'arm':28s}{'without':>15s}{'greedy':>15s}{'recovery':>15s}{'drift':>16s}"]  # fmt: skip
    for name, arm in part["arms"].items():
        cells = [arm["without"][-1], arm["greedy without"][-1], arm["recovery"], arm["drift"]]
        lines.append(f"{name:28s}" + "".join(f"{show(x):>15s}" for x in cells[:3]) + f"{show(cells[3]):>16s}")
    several = part["several"]
    lines += ["", f"{'instructions into names':36s}" + "".join(f"{f'task {i + 1}':>15s}" for i in range(AT_ONCE))]
    return lines + [f"{name:36s}" + "".join(f"{show(x):>15s}" for x in zip(*seeds, strict=True))
                    for name, seeds in several.items()]  # fmt: skip


def draw(result: dict[str, Any], path: Path) -> None:
    """By step: right answers without the instruction, other tasks with theirs, and sums answered at once."""
    panels = []
    if "tasks" in result:
        arms, steps = result["tasks"]["arms"], result["tasks"]["steps"]
        panels += [(arms, steps, "without", "right answers without the instruction"),
                   (arms, steps, "others with", "other tasks, with their instructions")]  # fmt: skip
    if "addition" in result:
        panels.append((result["addition"]["arms"], result["addition"]["steps"], "at once", "sums right at once"))
    if not panels:
        return
    with drawing(path, 5 * len(panels), 4.5) as drawn:
        for axes, (arms, steps, name, label) in zip(drawn.subplots(1, len(panels), squeeze=False)[0], panels,
                                                    strict=True):  # fmt: skip
            for number, (arm, curves) in enumerate(arms.items()):
                values = np.asarray(curves[name])
                style = "--" if arm.startswith("control") else "-"
                axes.plot(steps, values.mean(axis=1), style, color=f"C{number}", label=arm)
                if values.shape[1] > 1:
                    spread = values.std(axis=1, ddof=1)
                    low, high = values.mean(axis=1) - spread, values.mean(axis=1) + spread
                    axes.fill_between(steps, low, high, color=f"C{number}", alpha=0.1, linewidth=0)
            axes.set(xlabel="step", ylabel=label, ylim=(-0.03, 1.03))
            # The second panel has the arms of the first.
            if name != "others with":
                axes.legend(fontsize=7, frameon=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code, as `lmlab` does."""
    return exit_code(
        lambda: carry_out(tyro.cli(Options, prog=NAME, args=argv), run, draw, table, "context_distillation.svg"), NAME
    )


if __name__ == "__main__":
    sys.exit(main())
