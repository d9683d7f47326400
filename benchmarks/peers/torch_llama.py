"""Hugging Face transformers' LlamaForCausalLM under torch.optim.AdamW: 12,194,688 parameters."""

import os
from types import ModuleType

import numpy as np

from benchmarks import peers
from lmlab.core.errors import UserError


def make_step(seed: int, compiled: bool) -> peers.Step:
    """Build the model from `seed` and give its step; tokens_BT (8, 257) -> loss.

    `compiled` puts forward, loss and backward through torch.compile, which needs a C++ compiler and
    compiles in the first call. AdamW is torch's fused kernel in both cases.
    Sets the process's torch thread count and torch's global seed.
    """
    torch, transformers = import_torch()
    torch.set_num_threads(core_count())
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(llama_config(transformers)).train()
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=peers.LEARNING_RATE,
        betas=(peers.BETA_1, peers.BETA_2),
        eps=peers.ADAM_EPS,
        weight_decay=peers.WEIGHT_DECAY,
        fused=True,
    )

    def loss_fn(inputs_BT, labels_BT):
        # Labels are shifted by the caller. Passing `labels=` would shift them once more and so drop the
        # last of the 256 predictions.
        logits_BTV = model(input_ids=inputs_BT).logits
        return torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten())

    if compiled:
        loss_fn = torch.compile(loss_fn)

    def step(tokens_BT: np.ndarray) -> float:
        tokens = torch.from_numpy(tokens_BT).long()
        loss = loss_fn(tokens[:, :-1], tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def import_torch() -> tuple[ModuleType, ModuleType]:
    """Torch and transformers. Raises `UserError` where one of them is not installed."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise UserError(
            "peer", "torch_llama", "torch and transformers to be installed", "Run `pip install .[peers]`."
        ) from error
    return torch, transformers


def llama_config(transformers: ModuleType):
    """The sizes of every arm."""
    return transformers.LlamaConfig(
        vocab_size=peers.VOCAB,
        hidden_size=peers.WIDTH,
        intermediate_size=peers.FFN,
        num_hidden_layers=peers.N_LAYERS,
        num_attention_heads=peers.N_HEADS,
        num_key_value_heads=peers.N_HEADS,
        head_dim=peers.HEAD_SIZE,
        max_position_embeddings=peers.SEQ_LEN,
        rms_norm_eps=peers.NORM_EPS,
        rope_parameters={"rope_type": "default", "rope_theta": peers.ROPE_BASE},
        tie_word_embeddings=True,
        # Written for generation; in training it would only keep keys and values nobody reads.
        use_cache=False,
    )


def core_count() -> int:
    """Cores that this process may use."""
    # The cores this process may use, where the system can say; containers are often given fewer.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
