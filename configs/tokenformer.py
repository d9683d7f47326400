"""A small TokenFormer on the sources and help texts of Python's standard library; `lmlab grow` makes it larger.

As long as configs/demo.py takes. Grow it into configs/tokenformer_large.py.
"""

from lmlab.data.config import DataConfig, PythonLibrary, TrainedBPE
from lmlab.models.config import AttentionConfig, ExecutionConfig, ParameterTokens, TokenFormerConfig
from lmlab.optim.config import OptimConfig, ScheduleConfig
from lmlab.recipe import Pretrain
from lmlab.train.config import TrainConfig


def recipe() -> Pretrain:
    """192 parameter tokens in each projection of attention, 768 in place of the feed-forward."""
    return Pretrain(
        model=TokenFormerConfig(
            layers=4, width=192, max_length=512, attention=AttentionConfig(heads=6),
            parameter_tokens=ParameterTokens(qkv=192), execution=ExecutionConfig(unroll=0),
        ),
        data=DataConfig(
            sources={"python": PythonLibrary()}, tokenizer=TrainedBPE(vocab_size=2048), length=256, batch_size=8
        ),
        optim=OptimConfig(schedule=ScheduleConfig(peak=3e-3)),
        train=TrainConfig(steps=200, log_every=1, eval_every=50, sample_every=100, checkpoint_every=50),
    )  # fmt: skip
