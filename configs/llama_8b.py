"""The shape of Llama 3 8B: 8.03B parameters, rows of 8192 tokens, four million tokens a step.

For `lmlab plan llama_8b --mesh 1x64x1 --chip v5p`, and to train with a corpus and a tokenizer of your own. Costs about
5e19 operations per billion tokens. No run of it has been made here; expect what the data make of it.
"""

from lmlab.data.config import DataConfig, Files, TokenizerFile
from lmlab.models.config import AttentionConfig, ExecutionConfig, MLPConfig, RotaryConfig, TransformerConfig
from lmlab.objectives.config import NextTokenConfig
from lmlab.optim.config import OptimConfig, ScheduleConfig
from lmlab.recipe import EvalConfig, Pretrain
from lmlab.train.config import ParallelConfig, TrainConfig


def recipe() -> Pretrain:
    """Shape of arXiv 2407.21783, table 3, 8B."""
    return Pretrain(
        model=TransformerConfig(
            vocab_size=128256, layers=32, width=4096, max_length=8192, tied=False,
            attention=AttentionConfig(heads=32, kv_heads=8, head_dim=128), mlp=MLPConfig(width=14336),
            rotary=RotaryConfig(base=500_000.0),
            execution=ExecutionConfig(remat="full", compute_dtype="bfloat16"),
        ),
        data=DataConfig(
            sources={"text": Files("corpus/*.jsonl.gz")}, tokenizer=TokenizerFile("tokenizer.json"), length=8192,
            batch_size=512,
        ),
        objective=NextTokenConfig(chunk=256),
        optim=OptimConfig(schedule=ScheduleConfig(peak=3e-4, warmup=2000)),
        train=TrainConfig(steps=250_000, microbatches=8, eval_every=1000, sample_every=0, checkpoint_every=1000),
        parallel=ParallelConfig(data=1, fsdp=64),
        eval=EvalConfig(prompts=("",), baselines=False),
    )  # fmt: skip
