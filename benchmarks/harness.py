"""lm-evaluation-harness over one model folder, through its own hf model (torch) and through ours: the same answers?

CommonsenseQA as multiple choice, zero-shot, float32 on both sides. Needs lm_eval, datasets, torch and transformers. The
last line is JSON: items, how many of them both answer alike, both accuracies, the largest difference of a choice's
log-probability, and seconds (each arm's own loading is not counted, its compilation is).
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from lmlab.core.errors import UserError, check

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "qa" / "commonsenseqa_dev.jsonl.gz"
NAME = "commonsenseqa_local"


def commonsense_qa(path: Path, cache: Path | None = None) -> dict[str, Any]:
    """The task, over a local file of records {question, choices: {A, ...}, answer}; cache: for the datasets library."""
    return {
        "task": NAME,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(path)}, "cache_dir": str(cache) if cache else None},
        "validation_split": "validation",
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "{{[choices.A, choices.B, choices.C, choices.D, choices.E]}}",
        "doc_to_target": "{{'ABCDE'.index(answer)}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }


def run_task(model: Any, task: dict[str, Any], limit: int) -> dict[str, Any]:
    """What lm_eval finds: its results, and a sample for each document in the order of the file."""
    import lm_eval

    found = lm_eval.simple_evaluate(
        model=model, tasks=[task], limit=limit, num_fewshot=0, log_samples=True, bootstrap_iters=1, verbosity="ERROR"
    )
    (name,) = found["results"]
    return {"results": found["results"][name], "samples": sorted(found["samples"][name], key=lambda s: s["doc_id"])}


def hf_model(folder: Path) -> Any:
    """lm_eval's own model."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=8)


def our_model(folder: Path) -> Any:
    """The same folder through lmlab."""
    from lmlab.evals.harness import Served, harness_model
    from lmlab.interop.pretrained import load_pretrained

    loaded = load_pretrained(folder)
    if loaded.text is None:
        raise UserError("model", str(folder), "a folder with a tokenizer")
    return harness_model(Served(loaded.lm, loaded.params, loaded.text.tokenizer))


def compare(folder: Path, data: Path, items: int) -> dict[str, Any]:
    """Both arms over the first items."""
    runs, seconds = {}, {}
    for name, build in {"ours": our_model, "hf": hf_model}.items():
        model = build(folder)
        start = time.perf_counter()
        runs[name] = run_task(model, commonsense_qa(data), items)
        seconds[name] = time.perf_counter() - start
        del model
    logprobs = {
        name: np.asarray([[float(answer[0]) for answer in sample["filtered_resps"]] for sample in run["samples"]])
        for name, run in runs.items()
    }
    same = logprobs["ours"].argmax(axis=1) == logprobs["hf"].argmax(axis=1)
    return {
        "items": len(same),
        "identical": int(same.sum()),
        "acc_ours": runs["ours"]["results"]["acc,none"],
        "acc_hf": runs["hf"]["results"]["acc,none"],
        "acc_norm_ours": runs["ours"]["results"]["acc_norm,none"],
        "acc_norm_hf": runs["hf"]["results"]["acc_norm,none"],
        "max_difference": float(np.abs(logprobs["ours"] - logprobs["hf"]).max()),
        "seconds_ours": round(seconds["ours"], 1),
        "seconds_hf": round(seconds["hf"], 1),
    }


def main(argv: list[str] | None = None) -> int:
    """Compare, and fail unless all answers are the same."""
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="a Hugging Face folder with a tokenizer")
    parser.add_argument("--data", type=Path, default=DATA, help="CommonsenseQA records, .jsonl or .jsonl.gz")
    parser.add_argument("--items", type=int, default=200)
    args = parser.parse_args(argv)
    try:
        check((args.folder / "config.json").is_file(), "folder", str(args.folder), "a folder with a config.json")
        check(args.data.is_file(), "--data", str(args.data), "a file of CommonsenseQA records")
        check(args.items >= 1, "--items", args.items, "at least 1")
        result = compare(args.folder, args.data, args.items)
    except UserError as error:
        print(f"harness: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result))
    return 0 if result["identical"] == result["items"] else 1


if __name__ == "__main__":
    sys.exit(main())
