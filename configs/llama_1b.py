"""The shape of Llama 3.2 1B (heads of 128, which the TPU kernel takes, not 64): 1.24B parameters, rows of 4096 tokens.

For `lmlab plan llama_1b --mesh 1x32x1 --chip v5e`, and to train with a corpus and a tokenizer of your own. Costs about
3e19 operations per billion tokens. No run of it has been made here; expect what the data make of it.
"""

from lmlab.data.config import DataConfig, Files, TokenizerFile
from lmlab.models.config import AttentionConfig, ExecutionConfig, MLPConfig, RotaryConfig, TransformerConfig
from lmlab.objectives.config import NextTokenConfig
from lmlab.optim.config import OptimConfig, ScheduleConfig
from lmlab.recipe import EvalConfig, Pretrain
from lmlab.train.config import ParallelConfig, TrainConfig


def recipe() -> Pretrain:
    """Shape of arXiv 2407.21783, table 3, at the size of Llama 3.2 1B."""
    return Pretrain(
        model=TransformerConfig(
            vocab_size=128256, layers=16, width=2048, max_length=8192, tied=True,
            attention=AttentionConfig(heads=16, kv_heads=4, head_dim=128), mlp=MLPConfig(width=8192),
            rotary=RotaryConfig(base=500_000.0),
            execution=ExecutionConfig(remat="full", compute_dtype="bfloat16"),
        ),
        data=DataConfig(
            sources={"text": Files("corpus/*.jsonl.gz")}, tokenizer=TokenizerFile("tokenizer.json"), length=4096,
            batch_size=256,
        ),
        objective=NextTokenConfig(chunk=256),
        optim=OptimConfig(schedule=ScheduleConfig(peak=3e-4, warmup=2000)),
        train=TrainConfig(steps=100_000, microbatches=4, eval_every=1000, sample_every=0, checkpoint_every=1000),
        parallel=ParallelConfig(data=1, fsdp=32),
        eval=EvalConfig(prompts=("",), baselines=False),
    )  # fmt: skip
