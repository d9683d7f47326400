"""Transformers' LlamaForCausalLM in bfloat16 with flash attention, compiled: what a careful user of PyTorch runs.

Chosen for speed at the numerics of the other arm: weights, gradients and AdamW's moments in float32, the weights cast
to bfloat16 once a step inside the compiled graph, so that matmuls and the residual stream are 16-bit (what FSDP2's
mixed precision does; under autocast the residual stream stays float32 and is slower). The loss is float32 on 16-bit
logits. Attention is `scaled_dot_product_attention(is_causal=True)`, held to its flash and cuDNN kernels: transformers'
own sdpa path builds a dense mask whenever it is compiled under torch before 2.14, and a dense mask rules these out.
AdamW is torch's fused kernel. `remat` checkpoints whole layers.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import peers
from benchmarks.peers.torch_llama import import_torch

ATTENTION = "sdpa_causal"


def make_steps(
    shape: peers.Shape, seed: int, device: str, compute_dtype: str, remat: bool
) -> tuple[Callable[[np.ndarray, int], float], int]:
    """`steps(tokens_BT, count) -> loss` makes `count` steps and waits for the last; and the number of parameters.

    tokens_BT: int32 [B, T + 1]. Sets torch's global seed and its precision of float32 matmuls.
    """
    torch, transformers = import_torch()
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")
    _register_attention(torch, transformers)
    model = transformers.LlamaForCausalLM(_config(transformers, shape)).to(device).train()
    if remat:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=peers.LEARNING_RATE, betas=(peers.BETA_1, peers.BETA_2), eps=peers.ADAM_EPS,
        weight_decay=peers.WEIGHT_DECAY, fused=True,
    )  # fmt: skip
    weights, dtype = dict(model.named_parameters()), getattr(torch, compute_dtype)

    @torch.compile(dynamic=False)
    def loss_fn(inputs_BT: Any, labels_BT: Any) -> Any:
        cast = {name: weight.to(dtype) for name, weight in weights.items()}
        logits_BTV = torch.func.functional_call(model, cast, (), {"input_ids": inputs_BT}).logits
        return torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1).float(), labels_BT.flatten())

    def steps(tokens_BT: np.ndarray, count: int) -> float:
        tokens = torch.from_numpy(tokens_BT).long().to(device)
        inputs_BT, labels_BT = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        for _ in range(count):
            loss = loss_fn(inputs_BT, labels_BT)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        return loss.item()

    return steps, sum(weight.numel() for weight in weights.values())


def _register_attention(torch: Any, transformers: Any) -> None:
    """Give transformers an attention of its own name: it then makes no mask."""
    backends = [torch.nn.attention.SDPBackend.FLASH_ATTENTION, torch.nn.attention.SDPBackend.CUDNN_ATTENTION]

    def attend(module: Any, q_BNTH: Any, k_BKTH: Any, v_BKTH: Any, attention_mask: Any, **kwargs: Any) -> Any:
        if attention_mask is not None:
            raise RuntimeError("the causal peer was given a mask")
        with torch.nn.attention.sdpa_kernel(backends):
            out_BNTH = torch.nn.functional.scaled_dot_product_attention(q_BNTH, k_BKTH, v_BKTH, is_causal=True)
        return out_BNTH.transpose(1, 2).contiguous(), None

    transformers.AttentionInterface.register(ATTENTION, attend)


def _config(transformers: Any, shape: peers.Shape) -> Any:
    return transformers.LlamaConfig(
        vocab_size=shape.vocab, hidden_size=shape.width, intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.heads,
        rms_norm_eps=peers.NORM_EPS, rope_parameters={"rope_type": "default", "rope_theta": peers.ROPE_BASE},
        tie_word_embeddings=True, use_cache=False, attn_implementation=ATTENTION,
    )  # fmt: skip
