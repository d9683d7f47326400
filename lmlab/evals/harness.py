"""Any LM as a model of EleutherAI's lm-evaluation-harness: its tasks run in this process.

What is tokenised, truncated and scored follows `lm_eval.models.huggingface.HFLM` of lm_eval 0.4.13, so that numbers
compare with published ones.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import jax
import numpy as np

from lmlab.core.errors import UserError, check
from lmlab.core.types import Params
from lmlab.evals.pairs import encode_pairs
from lmlab.inference.config import SamplingConfig
from lmlab.inference.score import Pair, rolling, score
from lmlab.inference.text import sample_text
from lmlab.models.lm import LM

logger = logging.getLogger(__name__)
MAX_GEN_TOKS = 256
"""Tokens written where a task does not say how many."""
_SIZES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names that tasks give to the number of tokens; the first counts."""
_FILTERS = ("temperature", "top_k", "top_p", "min_p")


class Tokenizer(Protocol):
    """What the harness needs of a `TextTokenizer`."""

    @property
    def end_id(self) -> int:
        """Ends a document."""

    @property
    def begin_ids(self) -> tuple[int, ...]:
        """What comes before a text."""

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens each of which ends what a model writes."""

    @property
    def encode_marked(self) -> Callable[[str], tuple[np.ndarray, np.ndarray]]:
        """Ids of a text that may spell special tokens, and their places."""

    @property
    def decode(self) -> Callable[[Sequence[int]], str]:
        """Text of tokens."""

    @property
    def fingerprint(self) -> str:
        """Hash of all that decides how text is encoded."""


@dataclass(frozen=True)
class Served:
    """A model and how the harness is to ask it."""

    lm: LM
    params: Params
    tokenizer: Tokenizer
    render: Callable[[Sequence[Mapping[str, str]], bool], str] | None = None
    """`render(messages, add_generation_prompt)`: a chat as text; None: no chat template."""
    template: str = ""
    """Source of that template, for the harness's records."""
    prefix_id: int | None = None
    """What comes before a text that has no context. Default: the first of `begin_ids`, else the end token.
    HFLM takes the tokenizer's bos_token, also where it does not put that in front of texts."""
    batch_tokens: int = 4096
    """Places scored at a time."""
    seed: int = 0
    """Of tasks that sample."""


def harness_model(served: Served) -> Any:
    """The model as an `lm_eval.api.model.LM`, to be given to `lm_eval.simple_evaluate(model=...)`.

    Raises `UserError` if lm_eval is not installed.
    """
    try:
        from lm_eval.api import model as harness
    except ImportError as error:
        raise UserError("lm_eval", None, "lm-evaluation-harness", "Install it: pip install 'lmlab[harness]'") from error

    class Adapter(harness.LM):  # type: ignore[misc, unused-ignore]
        """Requests of the harness, answered by the functions of this module."""

        tokenizer_name = served.tokenizer.fingerprint

        def loglikelihood(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
            """(log p(continuation | context), whether greedy decoding would write it) of each request."""
            return loglikelihoods(served, [request.args for request in requests])

        def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
            """Log-probability of each text."""
            return rolling_loglikelihoods(served, [request.args[0] for request in requests])

        def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
            """What is written after each context."""
            return generations(served, [request.args for request in requests])

        def apply_chat_template(
            self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
        ) -> str:
            """A chat as text; without a generation prompt, up to the end of its last message."""
            return chat_text(served, chat_history, add_generation_prompt)

        def chat_template(self, chat_template: bool | str = False) -> str:
            """Source of the template."""
            return served.template if chat_template else ""

    return Adapter()


def loglikelihoods(served: Served, texts: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
    """Score (context, continuation) texts; contexts that are too long lose their beginning."""
    pairs = encode_pairs(lambda batch: [_encode(served, text) for text in batch], (), texts)
    pairs = [_fit(served, *_begin(served, text, pair)) for text, pair in zip(texts, pairs, strict=True)]
    found = score(served.lm, served.params, pairs, share_contexts=True, batch_tokens=served.batch_tokens)
    return [(one.total, one.greedy) for one in found]


def rolling_loglikelihoods(served: Served, texts: Sequence[str]) -> list[float]:
    """Log-probability of whole texts in disjoint windows; as in HFLM what `begin_ids` puts in front is scored too."""
    windows = [rolling(_encode(served, text), [_prefix(served)], served.lm.max_length) for text in texts]
    found = score(
        served.lm, served.params, [pair for pairs in windows for pair in pairs], batch_tokens=served.batch_tokens
    )
    owners = [i for i, pairs in enumerate(windows) for _ in pairs]
    totals = np.zeros(len(texts))
    np.add.at(totals, np.asarray(owners, int), [one.total for one in found])
    return totals.tolist()


def generations(served: Served, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """Continue contexts, each as its arguments say (until, max_gen_toks, do_sample, temperature, ...)."""
    groups: dict[str, list[int]] = {}
    for i, (_, arguments) in enumerate(requests):
        groups.setdefault(repr(sorted(arguments.items())), []).append(i)
    texts: dict[int, str] = {}
    key = jax.random.key(served.seed)
    for members in groups.values():
        config = sampling_config(requests[members[0]][1])
        codec = _Codec(served, served.lm.max_length - config.max_new_tokens)
        check(codec.room >= 1, "max_gen_toks", config.max_new_tokens, f"less than the context, {served.lm.max_length}")
        fresh = jax.random.fold_in(key, len(texts))
        drawn = sample_text(served.lm, served.params, codec, [requests[i][0] for i in members], fresh, config)
        texts.update(zip(members, [text for text, _ in drawn], strict=True))
    return [texts[i] for i in range(len(requests))]


def sampling_config(arguments: Mapping[str, Any]) -> SamplingConfig:
    """What the generation arguments of a task ask for. Raises `UserError` for those we cannot serve.

    Texts are sampled if do_sample says so, or if it says nothing and the temperature is above 0.
    """
    asked = {name: value for name, value in arguments.items() if value is not None}
    sizes = [asked.pop(name) for name in _SIZES if name in asked]
    until = asked.pop("until", ())
    stop = tuple(text for text in ((until,) if isinstance(until, str) else until) if text)
    if not asked.pop("do_sample", float(asked.get("temperature", 0)) > 0):
        # Greedy decoding reads none of them.
        asked = {name: value for name, value in asked.items() if name not in _FILTERS} | {"temperature": 0.0}
    if asked.get("num_beams") == 1:
        del asked["num_beams"]
    known = {field.name for field in fields(SamplingConfig)} - {"max_new_tokens", "stop"}
    unknown = sorted(set(asked) - known)
    check(not unknown, "gen_kwargs", unknown, f"until, do_sample, max_gen_toks, {', '.join(sorted(known))}")
    return SamplingConfig(**asked, max_new_tokens=int((*sizes, MAX_GEN_TOKS)[0]), stop=stop)


def chat_text(served: Served, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> str:
    """A chat as text. Without a generation prompt the last message is to be continued, and nothing follows it."""
    if served.render is None:
        raise UserError("chat template", None, "a model whose tokenizer has one", "Leave out --apply_chat_template.")
    text = served.render(messages, add_generation_prompt)
    if add_generation_prompt:
        return text
    last = messages[-1]["content"].strip()
    return text[: text.rindex(last) + len(last)]


@dataclass(frozen=True)
class _Codec:
    """Contexts as `sample_text` takes them: with what comes before a text, and cut on the left to `room` tokens."""

    served: Served
    room: int
    begin_ids: tuple[int, ...] = ()

    @property
    def end_ids(self) -> tuple[int, ...]:
        return self.served.tokenizer.end_ids

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        encoded = [_encode(self.served, text) for text in texts]
        empty = np.asarray([_prefix(self.served)], np.int32)
        return [ids[-self.room :] if len(ids) else empty for ids in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        return self.served.tokenizer.decode(ids)


def _prefix(served: Served) -> int:
    if served.prefix_id is not None:
        return served.prefix_id
    return (*served.tokenizer.begin_ids, served.tokenizer.end_id)[0]


def _encode(served: Served, text: str) -> np.ndarray:
    """Tokens of a text with what comes before it, unless the text spells that itself (a rendered chat)."""
    begin = served.tokenizer.begin_ids
    ids, _ = served.tokenizer.encode_marked(text)
    spelled = tuple(ids[: len(begin)].tolist()) == begin
    return ids if spelled else np.concatenate([np.asarray(begin, np.int32), ids])


def _begin(served: Served, text: tuple[str, str], pair: Pair) -> Pair:
    """A pair whose context is not empty: an empty text is one token, which is not scored."""
    context, continuation = pair
    if text[0] == "":
        continuation, _ = served.tokenizer.encode_marked(text[1])
        context = continuation[:0]
    if len(context):
        return context, continuation
    first = _prefix(served)
    if len(continuation) > 1 and continuation[0] == first:
        return continuation[:1], continuation[1:]
    return np.asarray([first], np.int32), continuation


def _fit(served: Served, context: np.ndarray, continuation: np.ndarray) -> Pair:
    keep = max(1, served.lm.max_length + 1 - len(continuation))
    if len(context) > keep:
        logger.warning("a context of %d tokens is cut to its last %d", len(context), keep)
    return context[-keep:], continuation
