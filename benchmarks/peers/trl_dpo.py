"""TRL's DPOTrainer over transformers' LlamaForCausalLM: one optimisation step for every line that it is told."""

import copy
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np

from benchmarks import peers
from benchmarks.peers.torch_llama import core_count, import_torch, llama_config
from lmlab.core.errors import UserError


def make_answer(
    seed: int, pairs: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], beta: float, batch: int, *,
    precomputed: bool, checkpointed: bool,
) -> Callable[[], tuple[float, float]]:  # fmt: skip
    """`answer() -> (seconds, loss)` of the next step of `trainer.train()`, which waits between steps.

    pairs: tokens of prompts, preferred and other answers; an answer's last token is left to TRL, which ends each with
    the last token of the vocabulary. precomputed: reference log-probabilities are computed before the first step.
    checkpointed: layers are computed a second time in the backward pass, which is TRL's default.
    """
    torch, transformers = import_torch()
    try:
        import datasets
        import trl
    except ImportError as error:
        raise UserError("peer", "trl", "trl and datasets to be installed", "Run `pip install .[peers]`.") from error
    torch.set_num_threads(core_count())
    torch.manual_seed(seed)
    words = lambda tokens: " ".join(f"w{token}" for token in tokens)
    rows = [
        {"prompt": words(prompt) + " ", "chosen": words(good[:-1]) + " ", "rejected": words(bad[:-1]) + " "}
        for prompt, good, bad in pairs
    ]
    config = trl.DPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=batch, max_steps=100_000, beta=beta, use_cpu=True,
        learning_rate=peers.LEARNING_RATE, adam_beta1=peers.BETA_1, adam_beta2=peers.BETA_2,
        adam_epsilon=peers.ADAM_EPS, weight_decay=peers.WEIGHT_DECAY, max_grad_norm=0.0,
        lr_scheduler_type="constant", bf16=False, gradient_checkpointing=checkpointed, logging_strategy="no",
        save_strategy="no", report_to=[], precompute_ref_log_probs=precomputed, disable_tqdm=True, seed=seed,
        max_length=None,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(llama_config(transformers))
    trainer = trl.DPOTrainer(
        model=model, ref_model=None if precomputed else copy.deepcopy(model), args=config,
        train_dataset=datasets.Dataset.from_list(rows), processing_class=_tokenizer(transformers),
    )  # fmt: skip
    losses: list[float] = []
    asked: queue.Queue[None] = queue.Queue()
    answers: queue.Queue[tuple[float, float]] = queue.Queue()

    class Turns(transformers.TrainerCallback):
        """Waits for its turn before a step and answers after it."""

        def on_step_begin(self, *args, **kwargs):
            asked.get()
            self.began = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            answers.put((time.perf_counter() - self.began, losses[-1]))

    compute_loss = trainer.compute_loss

    def recorded(*args, **kwargs):
        loss = compute_loss(*args, **kwargs)
        losses.append((loss[0] if isinstance(loss, tuple) else loss).item())
        return loss

    trainer.compute_loss = recorded
    trainer.add_callback(Turns())
    threading.Thread(target=trainer.train, daemon=True).start()

    def answer() -> tuple[float, float]:
        asked.put(None)
        return answers.get()

    return answer


def _tokenizer(transformers):
    """Words w0, w1, ... between blanks are the tokens 0, 1, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    model = Tokenizer(models.WordLevel({f"w{i}": i for i in range(peers.VOCAB)}, unk_token="w0"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    last = f"w{peers.VOCAB - 1}"
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, eos_token=last, pad_token=last)
