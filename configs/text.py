"""A small Llama on text of your own: .txt (one document a file), .jsonl, .jsonl.gz or .parquet (one a record).

    lmlab run text --data.sources.text.train 'corpus/*.jsonl.gz' --data.sources.text.text-field body

7.5M parameters; about an hour for 1000 steps on two CPU cores. What to expect depends on the text: the report sets
bits per byte beside n-grams and xz.
"""

from lmlab.data.config import DataConfig, Files, TrainedBPE
from lmlab.models.config import AttentionConfig, ExecutionConfig, TransformerConfig
from lmlab.optim.config import OptimConfig, ScheduleConfig
from lmlab.recipe import EvalConfig, Pretrain
from lmlab.train.config import TrainConfig


def recipe() -> Pretrain:
    """A recipe to copy."""
    return Pretrain(
        model=TransformerConfig(
            layers=6, width=288, max_length=1024, attention=AttentionConfig(heads=6, kv_heads=2),
            execution=ExecutionConfig(unroll=0),
        ),
        data=DataConfig(
            sources={"text": Files("corpus/*.txt")}, tokenizer=TrainedBPE(vocab_size=4096), length=512, batch_size=8
        ),
        optim=OptimConfig(rule="muon", schedule=ScheduleConfig(peak=4e-3, decay="wsd", end=0.0)),
        train=TrainConfig(steps=1000, eval_every=100, sample_every=250, checkpoint_every=100),
        eval=EvalConfig(prompts=("",)),
    )  # fmt: skip
