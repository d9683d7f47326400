"""The shape of Llama 3 70B: 70.6B parameters, rows of 8192 tokens, four million tokens a step.

For `lmlab plan llama_70b --mesh 1x64x4 --chip v5p`, and to train with a corpus and a tokenizer of your own. Costs about
5e20 operations per billion tokens. No run of it has been made here; expect what the data make of it.
"""

from lmlab.data.config import DataConfig, Files, TokenizerFile
from lmlab.models.config import AttentionConfig, ExecutionConfig, MLPConfig, RotaryConfig, TransformerConfig
from lmlab.objectives.config import NextTokenConfig
from lmlab.optim.config import OptimConfig, ScheduleConfig
from lmlab.recipe import EvalConfig, Pretrain
from lmlab.train.config import ParallelConfig, TrainConfig


def recipe() -> Pretrain:
    """Shape of arXiv 2407.21783, table 3, 70B."""
    return Pretrain(
        model=TransformerConfig(
            vocab_size=128256, layers=80, width=8192, max_length=8192, tied=False,
            attention=AttentionConfig(heads=64, kv_heads=8, head_dim=128), mlp=MLPConfig(width=28672),
            rotary=RotaryConfig(base=500_000.0),
            execution=ExecutionConfig(remat="full", compute_dtype="bfloat16"),
        ),
        data=DataConfig(
            sources={"text": Files("corpus/*.jsonl.gz")}, tokenizer=TokenizerFile("tokenizer.json"), length=8192,
            batch_size=512,
        ),
        objective=NextTokenConfig(chunk=256),
        optim=OptimConfig(schedule=ScheduleConfig(peak=1.5e-4, warmup=2000)),
        train=TrainConfig(steps=250_000, microbatches=8, eval_every=1000, sample_every=0, checkpoint_every=1000),
        parallel=ParallelConfig(data=1, fsdp=64, tensor=4),
        eval=EvalConfig(prompts=("",), baselines=False),
    )  # fmt: skip
