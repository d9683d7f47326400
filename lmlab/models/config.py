"""Shapes of language models as typed, frozen configs. Imports no JAX."""

from dataclasses import dataclass, field, replace
from typing import Literal, Self, TypeAlias

from lmlab.core.errors import check


@dataclass(frozen=True)
class RotaryConfig:
    """Rotary position embedding (arXiv 2104.09864) and its context extensions."""

    base: float = 10_000.0
    """Wavelength base theta."""
    fraction: float = 1.0
    """Share of each head that is rotated (GPT-NeoX: 0.25)."""
    pairs: Literal["half", "adjacent"] = "half"
    """Which coordinates form a pair: i with i + H/2 (Llama, NeoX), or 2i with 2i + 1 (GPT-J, Meta's own weights)."""
    scaling: Literal["none", "linear", "llama3"] = "none"
    """linear: positions divided by factor (arXiv 2306.15595); llama3: by wavelength, as Llama 3.1 does."""
    factor: float = 1.0
    """Extension factor of the scaling."""
    low_frequency_factor: float = 1.0
    """llama3: wavelengths above original_length / this are divided by factor."""
    high_frequency_factor: float = 4.0
    """llama3: wavelengths below original_length / this are kept."""
    original_length: int = 8192
    """llama3: context length before the extension."""
    skipped_layers: tuple[int, ...] = ()
    """Layers that do not rotate, from 0 (SmolLM3: every fourth, arXiv 2501.18795)."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        check(self.base > 0, "rotary.base", self.base, "a positive number")
        check(0 < self.fraction <= 1, "rotary.fraction", self.fraction, "a number in (0, 1]")
        check(self.factor > 0, "rotary.factor", self.factor, "a positive number")


@dataclass(frozen=True)
class AttentionConfig:
    """Multi-head attention with grouped keys and values (arXiv 2305.13245)."""

    heads: int = 4
    """N: query heads."""
    kv_heads: int = 0
    """K: key and value heads, each shared by N/K query heads; 0: as many as heads."""
    head_dim: int = 0
    """H: size of a head; 0: width / heads."""
    qkv_bias: bool = False
    """Bias on queries, keys and values (Qwen2, GPT-2, NeoX)."""
    out_bias: bool = False
    """Bias on the output projection (GPT-2, NeoX)."""
    qk_norm: bool = False
    """RMSNorm over each query and key head before the rotation (Qwen3)."""
    window: int = 0
    """Sliding window in tokens (Mistral); 0: no limit."""


@dataclass(frozen=True)
class MLPConfig:
    """Feed-forward block."""

    width: int = 0
    """F: hidden width; 0: 4 * width for gelu, 8/3 * width rounded up to 64 for swiglu."""
    activation: Literal["swiglu", "gelu", "gelu_tanh"] = "swiglu"
    """swiglu (arXiv 2002.05202), exact gelu (NeoX), or its tanh form (GPT-2)."""
    bias: bool = False
    """Biases on all its projections."""


@dataclass(frozen=True)
class ExecutionConfig:
    """How a model is computed; changes speed and memory, and nothing else beyond rounding."""

    unroll: int = 1
    """Layers per iteration of the scan over layers; 0: all of them (fastest step, longest compilation)."""
    stacked: bool = True
    """Parameters and caches of all layers in one array (compiles one layer once), or each layer's apart (decodes
    faster on a CPU, which copies the layer in hand out of a stack)."""
    remat: Literal["none", "dots", "full"] = "none"
    """What a layer keeps for the backward pass: everything; its matmuls with weights; nothing but its input."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of activations and matmuls. Norms, softmax and losses stay in float32; for parameters see optim."""
    attention: Literal["auto", "xla", "cudnn", "splash", "reference"] = "auto"
    """Attention back-end; auto: splash on TPU, cudnn on GPU in bfloat16, where they can, otherwise xla."""


@dataclass(frozen=True)
class DecoderConfig:
    """What decoders have in common, whatever their layers are."""

    vocab_size: int = 0
    """V; 0: as many as the tokenizer has. More pads the table, for instance to a multiple of the devices."""
    layers: int = 4
    """L."""
    width: int = 256
    """D."""
    max_length: int = 2048
    """Longest sequence (size of the table of learned positions)."""
    positions: Literal["rotary", "learned", "none"] = "rotary"
    """How tokens know where they are."""
    norm: Literal["rms", "layer"] = "rms"
    """RMSNorm (arXiv 1910.07467), or LayerNorm with bias."""
    norm_eps: float = 1e-5
    """Added inside the root."""
    tied: bool = True
    """Share the embedding with the unembedding."""
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    rotary: RotaryConfig = field(default_factory=RotaryConfig)
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)

    def __post_init__(self) -> None:
        """Check that the sizes fit each other."""
        for name in ("layers", "width", "max_length"):
            check(getattr(self, name) >= 1, f"model.{name}", getattr(self, name), "at least 1")
        heads, kv_heads = self.attention.heads, self.attention.kv_heads
        check(heads >= 1, "model.attention.heads", heads, "at least 1")
        divides = self.attention.head_dim > 0 or self.width % heads == 0
        check(divides, "model.attention.heads", heads, f"a divisor of model.width = {self.width}",
              "Or set model.attention.head_dim.")  # fmt: skip
        check(kv_heads == 0 or (kv_heads > 0 and heads % kv_heads == 0), "model.attention.kv_heads", kv_heads,
              f"a divisor of model.attention.heads = {heads}, or 0 for all")  # fmt: skip
        skipped = self.rotary.skipped_layers
        check(all(0 <= layer < self.layers for layer in skipped), "model.rotary.skipped_layers", skipped,
              f"layers from 0 to {self.layers - 1}")  # fmt: skip
        rotated = self.head_dim * self.rotary.fraction
        check(self.positions != "rotary" or int(rotated) % 2 == 0, "model.attention.head_dim", self.head_dim,
              "an even number of rotated coordinates (head_dim * rotary.fraction)")  # fmt: skip

    @property
    def head_dim(self) -> int:
        """H."""
        return self.attention.head_dim or self.width // self.attention.heads

    @property
    def kv_heads(self) -> int:
        """K."""
        return self.attention.kv_heads or self.attention.heads

    @property
    def embedding_std(self) -> float:
        """Standard deviation of a fresh embedding: GPT-2's."""
        return 0.02

    @property
    def logit_scale(self) -> float:
        """What the products with the unembedding are multiplied by."""
        return 1.0

    @property
    def layer_weights(self) -> int:
        """Entries of the matrices that a token meets in one layer; every kind of decoder counts its own."""
        raise NotImplementedError

    def part(self, devices: int) -> Self:
        """What one of so many devices along the tensor axis computes of it, as a model."""
        shape = replace(
            self.attention, heads=self.attention.heads // devices, kv_heads=self.kv_heads // devices,
            head_dim=self.head_dim,
        )  # fmt: skip
        return replace(self, vocab_size=self.vocab_size // devices, attention=shape)


@dataclass(frozen=True)
class TransformerConfig(DecoderConfig):
    """Pre-norm transformer. The defaults make a small Llama; fields cover Qwen, Mistral, GPT-2 and GPT-NeoX."""

    parallel_residual: bool = False
    """Attention and feed-forward read the same input (GPT-NeoX)."""
    mlp: MLPConfig = field(default_factory=MLPConfig)

    @property
    def mlp_width(self) -> int:
        """F."""
        if self.mlp.width:
            return self.mlp.width
        return -(-8 * self.width // 3 // 64) * 64 if self.mlp.activation == "swiglu" else 4 * self.width

    @property
    def layer_weights(self) -> int:
        """Entries of the matrices that a token meets in one layer."""
        attention = self.width * self.head_dim * 2 * (self.attention.heads + self.kv_heads)
        return attention + self.width * self.mlp_width * (3 if self.mlp.activation == "swiglu" else 2)

    def part(self, devices: int) -> Self:
        """What one of so many devices along the tensor axis computes of it, as a model."""
        return replace(super().part(devices), mlp=replace(self.mlp, width=self.mlp_width // devices))


@dataclass(frozen=True)
class ParameterTokens:
    """How many parameter tokens each attention to parameters of a layer has."""

    qkv: int = 0
    """Of the queries, of the keys and of the values, each for itself; 0: as many as the width."""
    proj: int = 0
    """Of the output of attention; 0: as many as qkv."""
    ffn: int = 0
    """In place of the feed-forward; 0: four times qkv."""


@dataclass(frozen=True)
class TokenFormerConfig(DecoderConfig):
    """Decoder whose linear maps are attention to parameters (arXiv 2410.23168). Its layers have no biases and no norms
    with parameters; the final norm has both.
    """

    norm: Literal["rms", "layer"] = "layer"
    """Inside of layers it has no parameters."""
    rotary: RotaryConfig = field(default_factory=lambda: RotaryConfig(fraction=0.25))
    parameter_tokens: ParameterTokens = field(default_factory=ParameterTokens)
    """n."""
    reference: ParameterTokens = field(default_factory=ParameterTokens)
    """Scores of a token are scaled to the norm tau = sqrt(reference). 0: n. A grown model keeps the numbers that it
    had before, and so its function."""
    normalisation: Literal["l2_norm_gelu", "gelu_l2_norm", "softmax"] = "l2_norm_gelu"
    """From scores to weights: the norm and then gelu (equation 5); gelu first; softmax times n."""
    gelu: Literal["exact", "tanh"] = "exact"
    """tanh: its approximation (the authors' JAX code)."""
    score_eps: float = 1e-6
    """Least norm of the scores: its square is added inside the root."""
    initialisation: Literal["neox", "maxtext"] = "neox"
    """neox (the authors' PyTorch code): normal, keys and embedding 0.02, values 2 / (L sqrt(D)). maxtext (their JAX
    code): truncated normal of variance 1 / inputs, embedding of variance 1, logits divided by sqrt(D)."""

    def __post_init__(self) -> None:
        """Check the sizes, and that nothing is asked for that such layers do not have."""
        super().__post_init__()
        for name in ("parameter_tokens", "reference"):
            for part in ("qkv", "proj", "ffn"):
                size = getattr(getattr(self, name), part)
                check(size >= 0, f"model.{name}.{part}", size, "a number of parameter tokens, or 0 for the default")
        for name in ("qkv_bias", "out_bias", "qk_norm"):
            check(not getattr(self.attention, name), f"model.attention.{name}", True, "False",
                  "Attention to parameters has no biases, and no norms with parameters.")  # fmt: skip
        check(self.score_eps > 0, "model.score_eps", self.score_eps, "a positive number")

    @property
    def counts(self) -> ParameterTokens:
        """The n of each, written out."""
        given = self.parameter_tokens
        qkv = given.qkv or self.width
        return ParameterTokens(qkv, given.proj or qkv, given.ffn or 4 * qkv)

    @property
    def references(self) -> ParameterTokens:
        """The tau^2 of each, written out."""
        given, counts = self.reference, self.counts
        return ParameterTokens(given.qkv or counts.qkv, given.proj or counts.proj, given.ffn or counts.ffn)

    @property
    def embedding_std(self) -> float:
        """Standard deviation of a fresh embedding."""
        return 1.0 if self.initialisation == "maxtext" else super().embedding_std

    @property
    def logit_scale(self) -> float:
        """What the products with the unembedding are multiplied by."""
        return self.width**-0.5 if self.initialisation == "maxtext" else 1.0

    @property
    def layer_weights(self) -> int:
        """Entries of the matrices that a token meets in one layer."""
        counts, heads, kv_heads = self.counts, self.attention.heads * self.head_dim, self.kv_heads * self.head_dim
        qkv = counts.qkv * (3 * self.width + heads + 2 * kv_heads)
        return qkv + counts.proj * (heads + self.width) + counts.ffn * 2 * self.width

    def part(self, devices: int) -> Self:
        """What one of so many devices along the tensor axis computes of it, as a model.

        Parameter tokens are divided, heads are not: a device makes a summand of every head. Attention between tokens,
        which is divided by heads, is counted whole.
        """
        counts = self.counts
        share = ParameterTokens(counts.qkv // devices, counts.proj // devices, counts.ffn // devices)
        vocab_size = self.vocab_size // devices
        return replace(self, vocab_size=vocab_size, parameter_tokens=share, reference=self.references)


ModelConfig: TypeAlias = TransformerConfig | TokenFormerConfig
"""The config of any language model of lmlab."""


@dataclass(frozen=True)
class GrowthConfig:
    """How parameter tokens are added to a trained model (arXiv 2410.23168), of any normalisation but softmax. The
    defaults keep its function, but for rounding, whatever the new values are. Keys and values of zero both keep it,
    too, and never learn.
    """

    keys: Literal["zeros", "normal"] = "zeros"
    """New keys; normal: as a new model draws them (what the authors' code runs)."""
    values: Literal["normal", "zeros"] = "normal"
    """New values."""
    tau: Literal["keep", "follow"] = "keep"
    """The norm of the scores: as before, or the root of the new number of parameter tokens (the authors' code)."""
    optimizer: Literal["reset", "extend"] = "reset"
    """State of the optimiser: new, or the old one with zeros for what is new; its schedule begins anew."""
