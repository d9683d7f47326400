"""A small Llama on the sources and help texts of Python's standard library.

Trains in about three minutes on two CPU cores.
"""

from lmlab.data.config import DataConfig, PythonLibrary, TrainedBPE
from lmlab.models.config import AttentionConfig, ExecutionConfig, TransformerConfig
from lmlab.optim.config import OptimConfig, ScheduleConfig
from lmlab.recipe import Pretrain
from lmlab.train.config import TrainConfig


def recipe() -> Pretrain:
    """The recipe of `make demo`."""
    return Pretrain(
        model=TransformerConfig(
            layers=4, width=192, max_length=512, attention=AttentionConfig(heads=6, kv_heads=2),
            execution=ExecutionConfig(unroll=0),
        ),
        data=DataConfig(
            sources={"python": PythonLibrary()}, tokenizer=TrainedBPE(vocab_size=2048), length=256, batch_size=16
        ),
        optim=OptimConfig(rule="muon", schedule=ScheduleConfig(peak=4e-3, decay="wsd", end=0.0)),
        train=TrainConfig(steps=400, eval_every=100, sample_every=200, checkpoint_every=100),
    )  # fmt: skip
