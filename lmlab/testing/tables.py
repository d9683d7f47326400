"""The conformance tables: a new model, objective, transform or stream adds a line and gets the generic tests."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import optax

from lmlab.core.types import Batch, Objective
from lmlab.data.chat import ChatTemplate
from lmlab.data.config import ConversationsConfig, DataConfig, Files
from lmlab.data.conversations import encode_conversations
from lmlab.data.stream import Stream, train_stream
from lmlab.data.tokenizers import byte_tokenizer
from lmlab.models.config import AttentionConfig, ExecutionConfig, MLPConfig, RotaryConfig
from lmlab.models.heads import multi_token_lm
from lmlab.models.heads_config import MultiTokenConfig
from lmlab.models.lm import LM
from lmlab.models.reward import reward_model
from lmlab.objectives.distill import TEACHER, distill
from lmlab.objectives.divergence import jensen_shannon
from lmlab.objectives.dpo import dpo
from lmlab.objectives.multi_token import multi_token
from lmlab.objectives.next_token import next_token
from lmlab.objectives.pair_losses import sigmoid
from lmlab.objectives.reward import reward_pairs
from lmlab.optim.chain import build_optimizer
from lmlab.optim.config import GaloreConfig, OptimConfig, ScheduleConfig
from lmlab.optim.ldadam import scale_by_ldadam
from lmlab.optim.matrices import by_axes
from lmlab.testing.tiny import (
    lively,
    random_batch,
    random_distillation,
    random_preferences,
    tiny_cache,
    tiny_lm,
    tiny_multi_token_lm,
    tiny_tokenformer,
)

LMS: dict[str, Callable[[], LM]] = {
    "llama": tiny_lm,
    "llama_unrolled": lambda: tiny_lm(execution=ExecutionConfig(unroll=0)),
    "llama_apart": lambda: tiny_lm(execution=ExecutionConfig(stacked=False)),
    "llama_remat": lambda: tiny_lm(execution=ExecutionConfig(remat="full")),
    "llama_remat_dots": lambda: tiny_lm(execution=ExecutionConfig(remat="dots")),
    "llama31": lambda: tiny_lm(
        rotary=RotaryConfig(base=500.0, scaling="llama3", factor=8.0, original_length=64), tied=False
    ),
    "adjacent_linear": lambda: tiny_lm(rotary=RotaryConfig(pairs="adjacent", scaling="linear", factor=2.0)),
    "qwen2": lambda: tiny_lm(attention=AttentionConfig(heads=4, kv_heads=2, qkv_bias=True)),
    "qwen3": lambda: tiny_lm(attention=AttentionConfig(heads=4, kv_heads=1, head_dim=8, qk_norm=True)),
    "mistral": lambda: tiny_lm(attention=AttentionConfig(heads=4, kv_heads=2, window=3)),
    "smollm3": lambda: tiny_lm(rotary=RotaryConfig(skipped_layers=(1,))),
    "gpt2": lambda: tiny_lm(
        positions="learned", norm="layer", attention=AttentionConfig(heads=4, qkv_bias=True, out_bias=True),
        mlp=MLPConfig(width=24, activation="gelu_tanh", bias=True),
    ),
    "neox": lambda: tiny_lm(
        norm="layer", tied=False, parallel_residual=True, rotary=RotaryConfig(fraction=0.5),
        attention=AttentionConfig(heads=4, qkv_bias=True, out_bias=True),
        mlp=MLPConfig(width=24, activation="gelu", bias=True),
    ),
    "no_positions": lambda: tiny_lm(positions="none"),
    "tokenformer": tiny_tokenformer,
    "tokenformer_maxtext": lambda: tiny_tokenformer(
        positions="none", initialisation="maxtext", gelu="tanh", attention=AttentionConfig(heads=4, kv_heads=2),
        execution=ExecutionConfig(stacked=False, remat="dots"),
    ),
    "tokenformer_gelu_l2_norm": lambda: tiny_tokenformer(normalisation="gelu_l2_norm"),
    "tokenformer_softmax": lambda: tiny_tokenformer(normalisation="softmax"),
    "multi_token": lambda: tiny_multi_token_lm("parallel").lm,
    "multi_token_whole": lambda: tiny_multi_token_lm("causal").whole,
    "multi_token_linear": lambda: tiny_multi_token_lm("linear").whole,
    "multi_token_sequential": lambda: tiny_multi_token_lm("sequential").whole,
}  # fmt: skip
"""Every language model of lmlab, tiny."""
CACHES = ("llama", "llama_apart", "mistral", "gpt2", "neox", "no_positions", "tokenformer", "multi_token_whole",
          "multi_token_sequential")  # fmt: skip
"""One for each way to keep places, windows, layers and heads: what those who decode can see of a model that keeps the
contract."""


@dataclass(frozen=True)
class ObjectiveCase:
    """An objective with a batch that it takes. `build` is given a model of a test's choice."""

    build: Callable[[LM], Objective]
    batch: Callable[..., Batch] = random_batch
    """`batch(rows=4, seed=0)`."""
    model: Callable[[LM], LM] = lambda lm: lm
    """Makes of that model the one whose parameters the objective takes."""


def _several_heads(chain: Any) -> ObjectiveCase:
    """Two heads on the test's model, which is given a layer more for the second one where that is a layer."""
    heads = lambda lm: multi_token_lm(MultiTokenConfig(replace(lm.config, layers=lm.config.layers + 1), 2, chain))
    return ObjectiveCase(
        lambda lm: multi_token(heads(lm), head_weights=(1.0, 0.5), chunk=3), model=lambda lm: heads(lm).lm
    )  # fmt: skip


def _with_teacher(lm: LM) -> LM:
    """The test's model with a teacher beside it."""
    init = lambda key: {**(params := lm.init(key)), TEACHER: lively(params)}
    return replace(lm, init=init, axes={**lm.axes, TEACHER: lm.axes})


OBJECTIVES: dict[str, ObjectiveCase] = {
    "next_token": ObjectiveCase(lambda lm: next_token(lm, chunk=3)),
    "next_token_z_loss": ObjectiveCase(lambda lm: next_token(lm, chunk=100, z_loss=1e-2)),
    "multi_token": _several_heads("parallel"),
    "multi_token_sequential": _several_heads("sequential"),
    "reward": ObjectiveCase(
        lambda lm: reward_pairs(reward_model(lm, "normal").rewards, center=0.1),
        random_preferences,
        lambda lm: replace(lm, init=reward_model(lm, "normal").init, axes=reward_model(lm, "normal").axes),
    ),
    "distill": ObjectiveCase(lambda lm: distill(lm, chunk=3), random_distillation, _with_teacher),
    "distill_top_k": ObjectiveCase(
        lambda lm: distill(lm, jensen_shannon(0.3), temperature=1.5, chunk=100), partial(random_distillation, k=3)
    ),
    "dpo": ObjectiveCase(lambda lm: dpo(lm, sigmoid, 0.5, sft=0.1, tail=0.5, chunk=3), random_preferences),
}
"""Every objective of lmlab."""


@dataclass(frozen=True)
class TransformCase:
    """An optimiser, built from the logical axes of the parameters, and how it wants those held."""

    build: Callable[[Any], optax.GradientTransformation]
    parameters: str = "float32"
    """As in `OptimConfig.parameters`."""
    stored: frozenset[str] = frozenset({"float32", "int32"})
    """Types of the arrays of its state."""


def _rule(name: Any, **changes: Any) -> TransformCase:
    schedule = ScheduleConfig(peak=1e-2, warmup=2)
    config = replace(OptimConfig(schedule=schedule), rule=name, **changes)
    return TransformCase(lambda axes: build_optimizer(config, axes, 20), config.parameters)


def _projected(name: Any = "adamw", stored: tuple[str, ...] = (), parameters: Any = "float32", **galore: Any) -> Any:
    # Two kernels, one with axes of heads and one of a stack: every one takes as long to compile as all of AdamW.
    galore = {"rank": 4, "refresh_every": 2, "include": ("attention/out", "gate_up"), **galore}
    case = _rule(name, parameters=parameters, galore=GaloreConfig(**galore))
    return replace(case, stored=case.stored | {*stored})


TRANSFORMS: dict[str, TransformCase] = {
    "adamw": _rule("adamw"),
    "lion": _rule("lion"),
    "adafactor": _rule("adafactor"),
    "muon": _rule("muon"),
    "sgd": _rule("sgd"),
    "no_clip_no_decay": _rule("adamw", clip=0.0, weight_decay=0.0),
    "master_weights": _rule("adamw", parameters="bfloat16_master"),
    "master_weights_muon": _rule("muon", parameters="bfloat16_master"),
    "stochastic_rounding": _rule("adamw", parameters="bfloat16_stochastic"),
    "stochastic_rounding_muon": _rule("muon", parameters="bfloat16_stochastic"),
    "galore": _projected(include=()),
    "galore_exact": _projected(refresh="svd", rank=0.5),
    "galore_rotated": _projected(moments="rotate", timing="stagger", orthonormalise="cholesky"),
    "galore_reset": _projected(moments="reset", side="reverse_std", refresh="randomised"),
    "galore_lion": _projected("lion"),
    "galore_adafactor": _projected("adafactor"),
    "galore_sgd": _projected("sgd", side="two_sided"),
    "galore_8bit": _projected(stored=("uint8",), moment_bits=8),
    "galore_master_weights": _projected(parameters="bfloat16_master"),
    "galore_stochastic_rounding": _projected(parameters="bfloat16_stochastic", moments="rotate"),
    "golore": _projected(refresh="orthonormal"),
    "q_galore": _projected(stored=("uint8",), timing="lazy", projectors="int4"),
    "fira": _projected(update="fira"),
    "apollo": _projected(update="apollo", refresh="gaussian", projectors="drawn", scale=1.0),
    "apollo_mini": _projected(update="apollo_mini", refresh="gaussian", projectors="drawn", scale=128.0, rank=1),
    "ldadam": TransformCase(lambda axes: optax.chain(scale_by_ldadam(by_axes(axes, ("out",)), 4), optax.scale(-1e-2))),
    "frugal": _projected(update="frugal", projectors="bfloat16", stored=("bfloat16",)),
}
"""Every optimiser of lmlab."""


def _mixture(**changes: Any) -> Callable[[int, int], Stream]:
    sources = {"a": Files("a"), "b": Files("b")}
    settings: dict[str, Any] = {"sources": sources, "weights": {"a": 2.0}, "length": 16, "batch_size": 4, **changes}
    config = DataConfig(**settings)
    caches = {name: tiny_cache(name, seed=i) for i, name in enumerate(config.sources)}
    return lambda host, hosts: train_stream(config, caches, host=host, hosts=hosts)


def _conversations(host: int, hosts: int) -> Stream:
    config = ConversationsConfig("chats", length=30, batch_size=4)
    chats = [{"prompt": "a" * (i % 7), "completion": "b" * (i % 5 + 1)} for i in range(40)]
    template = ChatTemplate("{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}", {})
    records = ((f"chats:{i}", chat) for i, chat in enumerate(chats))
    cache, _ = encode_conversations(records, config, byte_tokenizer(), template)
    return train_stream(config.stream_config(), {"conversations": cache}, host=host, hosts=hosts)


STREAMS: dict[str, Callable[[int, int], Stream]] = {
    "one_source": _mixture(sources={"a": Files("a")}, weights={}),
    "mixture": _mixture(),
    "one_document_a_row": _mixture(packing="pad"),
    "corpus_order": _mixture(order="corpus", seed=3),
    "whole_documents": _mixture(packing="whole", length=50),
    "cut_anew": _mixture(recut=True),
    "conversations": _conversations,
}
"""Every stream of lmlab, tiny: `build(host, hosts)` makes the part of one host; batches divide by 2 and 4."""
