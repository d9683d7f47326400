"""Five things at once, each in its slot: a TokenFormer with four heads, whose gradients are projected (GaLore), which
reads related documents one after the other (In-Context Pretraining), in bfloat16 with float32 master copies.

    lmlab run composed
    lmlab generate runs/composed --heads 4 --prompt 'import os'

It shows that they compose; no part is tuned to the others. A minute or two on two cores.
"""

from lmlab.data.config import Bytes, DataConfig, PythonLibrary
from lmlab.models.config import AttentionConfig, ExecutionConfig, ParameterTokens, TokenFormerConfig
from lmlab.optim.config import GaloreConfig, OptimConfig, ScheduleConfig
from lmlab.recipe import MultiToken
from lmlab.train.config import TrainConfig


def recipe() -> MultiToken:
    """Eight layers of width 128, the last four of them heads; subspaces of rank 32, renewed one by one."""
    return MultiToken(
        model=TokenFormerConfig(
            layers=8, width=128, max_length=1024, attention=AttentionConfig(heads=4),
            parameter_tokens=ParameterTokens(qkv=128), execution=ExecutionConfig(compute_dtype="bfloat16"),
        ),
        heads=4,
        data=DataConfig(
            sources={"python": PythonLibrary()}, tokenizer=Bytes(), length=256, batch_size=8, order="in_context",
            attend="row", positions="row",
        ),
        optim=OptimConfig(
            schedule=ScheduleConfig(peak=1e-2), parameters="bfloat16_master",
            galore=GaloreConfig(rank=32, refresh_every=50, timing="stagger"),
        ),
        train=TrainConfig(steps=100, log_every=10, eval_every=50, sample_every=100, checkpoint_every=50),
    )  # fmt: skip
