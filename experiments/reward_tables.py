"""The tables of the experiment on reward modelling: means over seeds, with the deviation where there are several."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.results import deviation


def show(values: Sequence[float], digits: int = 3) -> str:
    """Mean and deviation over seeds."""
    mean = f"{np.mean(values):.{digits}f}"
    return f"{mean} ±{deviation(values):.{digits}f}" if len(values) > 1 else mean


def pilot_tables(seeds: list[dict[str, Any]]) -> str:
    """Detection by rate and epoch, then accuracy of the cures by rate."""
    first = seeds[0]["detection"]
    epochs = list(next(iter(first.values()))["in-sample"])
    lines = ["vectors: AUC of -mu for planted flips, of the ensemble (of one member), by epoch",
             f"{'flipped':9s}{'':13s}" + "".join(f"{epoch:>24s}" for epoch in epochs)]  # fmt: skip
    for rate, kinds in first.items():
        for kind in kinds if float(rate) else ():
            values = [[seed["detection"][rate][kind][epoch] for seed in seeds] for epoch in epochs]
            cells = (f"{show([x['auc'] for x in some])} ({np.mean([x['auc of one member'] for x in some]):.3f})"
                     for some in values)  # fmt: skip
            lines.append(f"{float(rate):<9.0%}{kind:13s}" + "".join(f"{cell:>24s}" for cell in cells))
    lines += [
        "",
        "out-of-fold after 5 epochs: most likely noise rate, that by confident learning, share of mu < 0, flips by "
        "tenth, std by tenth",
    ]
    for rate in first:
        some = [seed["detection"][rate]["out-of-fold"]["5"] for seed in seeds]
        tenths = " ".join(f"{x:.2f}" for x in np.mean([x["flips by tenth"] for x in some], axis=0))
        stds = " ".join(f"{x:.2f}" for x in np.mean([x["std by tenth"] for x in some], axis=0))
        shares = "".join(
            f"{show([x[key] for x in some]):15s}" for key in ("noise rate", "by confident learning", "below 0")
        )
        lines.append(f"{float(rate):<9.0%}{shares}{tenths}   {stds}")
    lines += [
        "",
        "accuracy after training on one tenth of the pairs alone, lowest strength first; then on a tenth at random",
    ]
    for rate in seeds[0]["tenths alone"]:
        values = np.mean([seed["tenths alone"][rate] for seed in seeds], axis=0)
        lines.append(f"{float(rate):<9.0%}" + " ".join(f"{x:.3f}" for x in values))
    for rate in seeds[0]["cures"]:
        lines += ["", *cure_table(seeds, rate)]
    return "\n".join(lines)


def cure_table(seeds: list[dict[str, Any]], rate: str) -> list[str]:
    """Accuracy on clean pairs by epoch; after the last under the shift, and over "nothing" with the same seed."""
    arms = seeds[0]["cures"][rate]
    epochs = list(arms["nothing"]["test"])
    last = epochs[-1]
    heads = [f"epoch {epoch}" for epoch in epochs] + [f"shifted, {last}", f"gain, {last}"]
    lines = [f"vectors, {float(rate):.0%} flipped: accuracy on clean pairs",
             f"{'':30s}" + "".join(f"{head:>15s}" for head in heads)]  # fmt: skip
    for arm in arms:
        found = [seed["cures"][rate][arm] for seed in seeds]
        cells = [show([x["test"][epoch] for x in found]) for epoch in epochs]
        gains = [
            x["test"][last] - seed["cures"][rate]["nothing"]["test"][last] for x, seed in zip(found, seeds, strict=True)
        ]
        cells += [show([x["shifted"][last] for x in found]), show(gains)]
        lines.append(f"{arm:30s}" + "".join(f"{cell:>15s}" for cell in cells))
    return lines


def meta_table(arms: dict[str, dict[str, list[float]]]) -> str:
    """Every arm, and its accuracy on shifted pairs less that of "eta 0" with the same seed."""
    base = arms["eta 0"]["accuracy, shifted"]
    names = list(arms["eta 0"])
    lines = [
        "MetaRM, 10 % flipped",
        f"{'':32s}" + "".join(f"{name:>20s}" for name in names) + f"{'shifted - eta 0':>20s}",
    ]
    for arm, found in arms.items():
        gains = np.subtract(found["accuracy, shifted"], base).tolist()
        cells = [show(found[name], 4) for name in names] + [show(gains, 4)]
        lines.append(f"{arm:32s}" + "".join(f"{cell:>20s}" for cell in cells))
    return "\n".join(lines)


def digits_table(seeds: list[dict[str, Any]]) -> str:
    """Detection, and accuracy after the first, the middle and the last epoch."""
    found = [seed["detection"] for seed in seeds]
    lines = [
        "digit strings, 20 % flipped: " + ", ".join(f"{name} {show([x[name] for x in found])}" for name in found[0])
    ]
    last = len(seeds[0]["accuracy"]["nothing"])
    epochs = sorted({1, (last + 1) // 2, last})
    lines.append(f"{'accuracy on clean pairs':30s}" + "".join(f"{f'epoch {epoch}':>15s}" for epoch in epochs))
    for arm in seeds[0]["accuracy"]:
        cells = (show([seed["accuracy"][arm][epoch - 1] for seed in seeds]) for epoch in epochs)
        lines.append(f"{arm:30s}" + "".join(f"{cell:>15s}" for cell in cells))
    return "\n".join(lines)


def pairs_table(result: dict[str, Any]) -> str:
    """What was found of planted flips, and accuracy of each arm on labels as they were given."""
    seeds = result["seeds"]
    lines = [f"real pairs, {result['train']:,} with 20 % flipped, {result['test']:,} to test as they are"]
    names = [name for name in seeds[0] if name != "accuracy"]
    lines += [f"{name:30s}{show([seed[name] for seed in seeds]):>15s}" for name in names]
    for arm in seeds[0]["accuracy"]:
        lines.append(f"accuracy, {arm:30s}{show([seed['accuracy'][arm] for seed in seeds]):>15s}")
    return "\n".join(lines)


def votes_table(seeds: list[dict[str, Any]]) -> str:
    """Agreement of the other two people with the label, by fifth of its strength."""
    fifths = zip(*(seed["agreement"] for seed in seeds), strict=True)
    return "\n".join([
        "votes: agreement of the other two with the first, by fifth of strength, lowest first",
        "".join(f"{show(fifth):>15s}" for fifth in fifths),
        *(f"{name:20s}{show([seed[name] for seed in seeds]):>15s}" for name in ("out of fold", "auc of dissent")),
    ])  # fmt: skip
