"""A Llama of GPT-2's size: 124M parameters with a vocabulary of 50304, rows of 1024 tokens, half a million a step.

For `lmlab plan llama_124m --mesh 8x1x1 --chip v5e`, and to train with a corpus of your own: byte-level BPE is trained
on it. Costs about 8e17 operations per billion tokens. No run of it has been made here; expect what the data make of it.
"""

from lmlab.data.config import DataConfig, Files, TrainedBPE
from lmlab.models.config import AttentionConfig, ExecutionConfig, MLPConfig, RotaryConfig, TransformerConfig
from lmlab.objectives.config import NextTokenConfig
from lmlab.optim.config import OptimConfig, ScheduleConfig
from lmlab.recipe import EvalConfig, Pretrain
from lmlab.train.config import ParallelConfig, TrainConfig


def recipe() -> Pretrain:
    """Shape of arXiv 2407.21783, table 3, as small as GPT-2."""
    return Pretrain(
        model=TransformerConfig(
            vocab_size=50304, layers=12, width=768, max_length=2048, tied=True,
            attention=AttentionConfig(heads=6, kv_heads=6, head_dim=128), mlp=MLPConfig(width=2048),
            rotary=RotaryConfig(base=10_000.0),
            execution=ExecutionConfig(remat="dots", compute_dtype="bfloat16"),
        ),
        data=DataConfig(
            sources={"text": Files("corpus/*.jsonl.gz")}, tokenizer=TrainedBPE(vocab_size=50304), length=1024,
            batch_size=512,
        ),
        objective=NextTokenConfig(chunk=128),
        optim=OptimConfig(schedule=ScheduleConfig(peak=6e-4, warmup=1000)),
        train=TrainConfig(steps=20_000, microbatches=4, eval_every=1000, sample_every=0, checkpoint_every=1000),
        parallel=ParallelConfig(data=0),
        eval=EvalConfig(prompts=("",), baselines=False),
    )  # fmt: skip
