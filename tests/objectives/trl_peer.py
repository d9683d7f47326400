"""TRL's losses on given log-probabilities, computed by its own trainers; as a script it writes trl_goldens.json anew.

    python tests/objectives/trl_peer.py

Needs trl 1.16, datasets and torch.
"""

import json
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np

BETA, SMOOTHING, PAIRS = 0.3, 0.1, 12
DPO = ("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
       "apo_zero", "apo_down", "discopop", "sigmoid_norm")  # fmt: skip
DIVERGENCES = ("forward_kl", "js_divergence", "alpha_divergence")


def random_scores(seed=0):
    """Log-probabilities of preferred and other answers under policy and reference, and their lengths."""
    rng = np.random.default_rng(seed)
    logprobs = -8 + 2 * rng.standard_normal((4, PAIRS))
    return np.concatenate([logprobs, rng.integers(2, 7, (2, PAIRS))]).astype(np.float32)


def dpo_trainer(model, tokenizer, **changes):
    """TRL's trainer around a model, on one pair of data."""
    import datasets
    import trl

    config = trl.DPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=2, beta=BETA, label_smoothing=SMOOTHING,
        use_cpu=True, bf16=False, report_to=[], gradient_checkpointing=False, **changes,
    )  # fmt: skip
    row = {"prompt": "w1 ", "chosen": "w2 ", "rejected": "w3 "}
    return trl.DPOTrainer(
        model=model, ref_model=None, args=config, train_dataset=datasets.Dataset.from_list([row]),
        processing_class=tokenizer,
    )  # fmt: skip


def words(size):
    """A tokenizer of w0, w1, ..., the last of which ends texts and fills rows up."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    model = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token=f"w{size - 1}", pad_token=f"w{size - 1}"
    )


def tiny_llama(size):
    """A model that only has to exist."""
    import transformers

    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=size, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
    ))  # fmt: skip


def dpo_losses(scores):
    """Mean losses by name; `a/b`: with f-divergence b."""
    import torch

    trainer = dpo_trainer(tiny_llama(8), words(8), precompute_ref_log_probs=True)
    chosen, rejected, chosen_ref, rejected_ref, *lengths = torch.from_numpy(scores)
    width = int(scores[4:].max())
    mask = torch.arange(width) < torch.cat(lengths)[:, None]
    # A token before the answer, whose log-probability the trainer shifts away.
    mask = torch.cat([torch.zeros(2 * PAIRS, 1, dtype=torch.bool), mask], dim=1).long()
    logprobs = torch.zeros(2 * PAIRS, width)
    logprobs[:, 0] = torch.cat([chosen, rejected])
    zeros = torch.zeros(2 * PAIRS, width)
    outputs = SimpleNamespace(log_probs=logprobs, entropy=zeros, mean_logits=zeros, is_top1=zeros > 0)

    class Model:
        training = True

        def __call__(self, **inputs):
            return outputs

    inputs = {"input_ids": mask * 0, "attention_mask": mask * 0 + 1, "completion_mask": mask,
              "ref_chosen_logps": chosen_ref, "ref_rejected_logps": rejected_ref}  # fmt: skip
    trainer.model, trainer.loss_weights = Model(), [1.0]
    found = {}
    for name in DPO:
        trainer.loss_types = [name]
        found[name] = float(trainer._compute_loss(trainer.model, inputs, False))
    trainer.loss_types = ["sigmoid"]
    for name in DIVERGENCES:
        trainer.f_divergence_type = name
        found[f"sigmoid/{name}"] = float(trainer._compute_loss(trainer.model, inputs, False))
    return found


def other_losses(scores):
    """Mean losses of the trainers without a reference, whose losses are methods of log-probabilities alone."""
    import torch
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    chosen, rejected, *_, chosen_length, rejected_length = torch.from_numpy(scores)
    settings = SimpleNamespace(
        alpha=0.0, beta=BETA, label_smoothing=0.0, simpo_gamma=0.5, accelerator=SimpleNamespace(device="cpu")
    )
    found = {}
    settings.loss_type = "sigmoid"
    found["cpo/sigmoid"] = float(CPOTrainer.cpo_loss(settings, chosen, rejected)[0].mean())
    settings.loss_type = "simpo"
    means = chosen / chosen_length, rejected / rejected_length
    found["cpo/simpo"] = float(CPOTrainer.cpo_loss(settings, *means)[0].mean())
    found["orpo/odds"] = -float(ORPOTrainer.odds_ratio_loss(settings, *means)[0].mean())
    return found


def all_losses(scores):
    """Every loss that is compared."""
    return dpo_losses(scores) | other_losses(scores)


if __name__ == "__main__":
    scores = random_scores()
    record = {"beta": BETA, "scores": scores.tolist(), "losses": all_losses(scores)}
    (Path(__file__).parent / "trl_goldens.json").write_text(json.dumps(record, indent=1) + "\n")
