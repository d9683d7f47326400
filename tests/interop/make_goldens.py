"""Writes goldens/*.json: logits of the tiny models by transformers. Needs torch and transformers (`pip install
'.[peers]'`); run `python tests/interop/make_goldens.py` from the root of the tree after a change of the models.
"""

import json
from pathlib import Path

import torch
import transformers
from tiny_models import CONFIGS, SHOWN, TOKENS, weight

FOLDER = Path(__file__).parent / "goldens"


def logits_by_transformers(fields):
    """Float32 [T, V] of the first row of tokens, computed by transformers with the weights of `tiny_models.weight`."""
    kind = fields["model_type"]
    config = transformers.AutoConfig.for_model(**fields)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            # The one tensor that transformers calls otherwise in memory than on disk.
            stored = "embed_out.weight" if (kind, name) == ("gpt_neox", "lm_head.weight") else name
            tensor.copy_(torch.from_numpy(weight(stored, tuple(tensor.shape))))
        return model(torch.from_numpy(TOKENS[:1])).logits[0]


if __name__ == "__main__":
    for name, fields in CONFIGS.items():
        rows = logits_by_transformers(fields)[list(SHOWN)].tolist()
        text = json.dumps([[round(value, 5) for value in row] for row in rows])
        (FOLDER / f"{name}.json").write_text(text + "\n")
        print(name, text[:60])
