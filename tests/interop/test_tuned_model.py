"""A real chat model, fine-tuned for a few steps, exported, and asked again by transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data_at_hand import data_file, smollm2_file

from experiments.sft import main
from lmlab.data.chat import encode_chat_prompt
from lmlab.runs import load_run

torch = pytest.importorskip("torch", reason="make parity installs torch and transformers")
transformers = pytest.importorskip("transformers", reason="make parity installs torch and transformers")
pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.slow]

PROMPTS = ("What is the capital of France?", "Write a haiku about rain.", "Was ist 2 + 2? é 漢字 \n\n<b>")
WORDS = [
    "--data.length", "64", "--data.batch-size", "2", "--data.heldout-percent", "1", "--train.steps", "2",
    "--train.sample-every", "0", "--eval.batches", "1", "--parallel.data", "1", "--optim.schedule.peak", "1e-4",
]  # fmt: skip


def test_a_tuned_smollm2_says_the_same_in_transformers(tmp_path):
    run, folder = tmp_path / "run", tmp_path / "hf"
    source, data = str(smollm2_file()), str(data_file("instructions/dolly_3k.jsonl.gz"))
    words = ["--source", source, "--data.train", data, "--out", str(run), "--export", str(folder), *WORDS]
    assert main(words) == 0
    ours = load_run(run)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for prompt in PROMPTS:
        chat = [{"role": "user", "content": prompt}]
        ids_T = encode_chat_prompt(ours.text.chat, ours.text.tokenizer, chat)
        assert tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] == ids_T.tolist()
        hidden_1TD, _ = ours.lm.apply(ours.params, jnp.asarray(ids_T[None]))
        logits_TV = np.asarray(ours.lm.logits(ours.params, hidden_1TD))[0]
        with torch.no_grad():
            expected_TV = theirs(torch.from_numpy(ids_T[None].astype(np.int64))).logits[0].numpy()
        difference = np.abs(logits_TV - expected_TV).max()
        print(f"logits up to {np.abs(expected_TV).max():.1f} differ by at most {difference:.1e}")
        np.testing.assert_allclose(logits_TV, expected_TV, atol=2e-3)
    assert {leaf.dtype for leaf in jax.tree.leaves(ours.params)} == {jnp.dtype("float32")}
