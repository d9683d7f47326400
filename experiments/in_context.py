"""In-Context Pretraining beside random order, with attention across documents and without (arXiv 2310.10638).

    python -m experiments.in_context [--smoke] [--out FOLDER] [--text POSTS.jsonl.gz]

First a corpus of topics: each is a map of 6 of 16 keys to 16 values, and each of its 8 documents holds 4 of the pairs.
A small transformer learns to look a value up in an earlier document of its window, or does not: four arms, {random,
related} order x {row, document} attention, on the same documents. The loss on values is told by the document's place in
windows of four documents of topics that were never seen. Chance is ln 16 = 2.773; only related order with attention
across documents should get below it, from the second document on.

Then real text, if a file is named (20 Newsgroups: one post a line, fields "text" and "group"): how alike neighbours are
in every kind of order, for tf-idf and for MiniLM where it is installed; and the same four arms on a language model, by
held-out loss on rows of related posts and of posts at random.

Prints tables; writes results.json and in_context.svg. Expect about 10 minutes for each part on two CPU cores.
"""

import gzip
import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from lmlab.cli import exit_code
from lmlab.core.errors import UserError, check
from lmlab.core.types import Array, Params, TokenBatch
from lmlab.data.cache import TokenCache
from lmlab.data.config import DataConfig, Files, InContextOrder, TrainedBPE
from lmlab.data.folders import cache_root
from lmlab.data.in_context import Related, arrange, order_documents, related_documents
from lmlab.data.open import Data, open_data
from lmlab.data.packing import lay_out, row_at, stack_rows
from lmlab.data.path_quality import path_quality
from lmlab.data.stream import Stream, train_stream
from lmlab.data.vectors import Corpus, corpus_of
from lmlab.models.config import AttentionConfig, MLPConfig, TransformerConfig
from lmlab.models.lm import LM
from lmlab.models.rows import Scope, read_rows
from lmlab.models.transformer import transformer
from lmlab.objectives.next_token import next_token
from lmlab.optim.chain import build_optimizer
from lmlab.optim.config import OptimConfig, ScheduleConfig
from lmlab.retrieval.config import MiniLM
from lmlab.retrieval.encoder import Encoder, unit_rows
from lmlab.train.state import new_state
from lmlab.train.step import make_evaluation, make_step, ratio_value

NAME = "python -m experiments.in_context"
ORDERS: tuple[str, ...] = ("random", "related")
"""Of the documents."""
SCOPES: tuple[Scope, ...] = ("row", "document")
"""What a token attends to, and where positions begin."""
KEYS, VALUES, PAIRS, SHOWN, COPIES = 16, 16, 6, 4, 8
"""Keys and values there are; pairs of a topic, pairs in a document, documents of a topic."""
SIZE, WINDOW, ROWS = 1 + 2 * SHOWN, 4, 64
"""Tokens of a document, documents of a window, windows of a batch."""
TOPIC_MODEL = TransformerConfig(
    vocab_size=1 + KEYS + VALUES, layers=2, width=64, max_length=SIZE * WINDOW, positions="learned", norm="layer",
    attention=AttentionConfig(heads=4), mlp=MLPConfig(activation="gelu"),
)  # fmt: skip
TEXT_MODEL = replace(TOPIC_MODEL, layers=4, width=128, max_length=512, positions="rotary", norm="rms",
                     mlp=MLPConfig())  # fmt: skip
RULES = {
    "random": {"tour": "random"}, "clusters": {"tour": "clusters"}, "released code": {"tour": "release"},
    "buffer chain": {"tour": "buffer_chain"}, "static degree": {"tour": "static"}, "dynamic degree": {},
    "dynamic, linked": {"link_fragments": True}, "greedy edges": {"tour": "greedy_edges"},
    "greedy edges, linked": {"tour": "greedy_edges", "link_fragments": True},
}  # fmt: skip
"""The ways to order, as changes of the default."""


@dataclass(frozen=True)
class Options:
    """Train on related documents and on random ones, with attention across documents and without."""

    out: str = "runs/in_context"
    """Where results.json and the figure go."""
    text: str = ""
    """Posts, .jsonl or .jsonl.gz with fields "text" and "group"; empty: the second part is skipped."""
    only: str = ""
    """topics or text: that part alone."""
    smoke: bool = False
    """A few steps on a few documents, to see that it runs."""
    seeds: int = 3
    """Corpora and trainings of each arm in the first part."""
    topics: int = 4000
    """With few topics the model learns them by heart, and the effect drowns."""
    steps: int = 1000
    """Steps of an arm in the first part."""
    text_steps: int = 250
    """In the second."""
    text_seeds: int = 1
    """Trainings of each arm in the second part."""


def train(lm: LM, streams: Sequence[Stream], steps: int, peak: float) -> Params:
    """Parameters [S, ...] after training on one stream each, from parameters of their own."""
    schedule = ScheduleConfig(peak=peak, warmup=0.1, end=0.0)
    tx = build_optimizer(OptimConfig(schedule=schedule), lm.axes, steps)
    step = make_step(next_token(lm), tx)
    every = jax.vmap(lambda state, batch: step(state, batch)[0])
    advance = jax.jit(
        lambda states, rows: jax.lax.scan(lambda states, batch: (every(states, batch), None), states, rows)[0],
        donate_argnums=0,
    )
    keys = jax.random.split(jax.random.key(0), len(streams))
    states = jax.jit(jax.vmap(lambda key: new_state(lm.init(key), tx, key)))(keys)
    count = math.gcd(steps, 50)
    stack = lambda *batches: np.stack(batches)
    rows = zip(*(stream.batches(0, steps) for stream in streams), strict=True)
    for _ in range(steps // count):
        states = advance(states, jax.tree.map(stack, *(jax.tree.map(stack, *next(rows)) for _ in range(count))))
    return states.params


def topic_documents(topics: int, copies: int, rng: np.random.Generator) -> np.ndarray:
    """int32 [topics * copies, SIZE]: 0, then keys (from 1) and values (from 1 + KEYS) in turn; topic by topic."""
    keys = np.argsort(rng.random((topics, KEYS)), axis=1)[:, :PAIRS]
    values = rng.integers(0, VALUES, (topics, PAIRS))
    chosen = np.argsort(rng.random((topics, copies, PAIRS)), axis=2)[..., :SHOWN]
    documents = np.zeros((topics, copies, SIZE), np.int32)
    documents[..., 1::2] = 1 + np.take_along_axis(keys[:, None], chosen, axis=2)
    documents[..., 2::2] = 1 + KEYS + np.take_along_axis(values[:, None], chosen, axis=2)
    return documents.reshape(-1, SIZE)


def pair_encoder(documents_NS: np.ndarray) -> Encoder:
    """Tf-idf of (key, value) pairs; the text of a document is its number."""
    pair = (documents_NS[:, 1::2] - 1) * VALUES + documents_NS[:, 2::2] - 1 - KEYS
    counts = np.zeros((len(pair), KEYS * VALUES), np.float32)
    np.put_along_axis(counts, pair, 1, axis=1)
    vectors_ND = unit_rows(counts * np.log((1 + len(counts)) / (1 + counts.sum(axis=0, keepdims=True))))
    name = f"pairs {hashlib.blake2b(documents_NS.tobytes()).hexdigest()}"
    return Encoder(KEYS * VALUES, name, lambda texts: lambda some: vectors_ND[[int(text) for text in some]])


def topic_streams(options: Options, seed: int) -> tuple[dict[str, Stream], dict[str, float]]:
    """The same documents at random and as the whole pipeline orders them, and how good that order is."""
    rng = np.random.default_rng(seed)
    documents_NS = topic_documents(options.topics, COPIES, rng)
    topic = np.repeat(np.arange(options.topics), COPIES)
    mixed = rng.permutation(len(documents_NS))
    documents_NS, topic = documents_NS[mixed], topic[mixed]
    count = len(documents_NS)
    corpus = Corpus(count, str, np.full(count, SIZE), f"topics {options.topics} {seed}", f"topics, seed {seed}")
    config = InContextOrder(neighbours=10, duplicates="none")
    order = order_documents(config, corpus, cache_root(), encoder=pair_encoder(documents_NS))
    cache = TokenCache(documents_NS.ravel(), np.arange(count + 1) * SIZE, str, count, corpus.fingerprint)
    data = DataConfig(sources={"topics": Files("")}, length=SIZE * WINDOW, batch_size=ROWS, seed=seed)
    orders = {"random": rng.permutation(count), "related": np.asarray(order.documents)}
    path = orders["related"]
    quality = {key: float(order.report[key]) for key in ("similarity", "jumps", "ratio")}  # type: ignore[arg-type]
    quality["same topic"] = float(np.mean(topic[path[1:]] == topic[path[:-1]]))
    return {name: train_stream(data, {"topics": cache}, orders={"topics": x}) for name, x in orders.items()}, quality


def value_losses(lm: LM, params: Params) -> tuple[Array, Array]:
    """Loss on values by place of the document [WINDOW], and on those whose key an earlier document showed [].

    Windows of related documents of topics that no training has seen.
    """
    documents = topic_documents(64, WINDOW, np.random.default_rng(10**6)).reshape(64, WINDOW, SIZE)
    keys = documents[..., 1::2]
    seen = np.stack([np.stack([np.isin(row[d], row[:d]) for d in range(WINDOW)]) for row in keys])
    tokens_BT = jnp.asarray(documents.reshape(64, -1))
    places_BT = jnp.broadcast_to(jnp.arange(WINDOW * SIZE)[None], tokens_BT.shape)
    hidden_BTD, _ = lm.apply(params, tokens_BT, segments_BT=places_BT // SIZE + 1, positions_BT=places_BT % SIZE)
    losses_BT = optax.softmax_cross_entropy_with_integer_labels(lm.logits(params, hidden_BTD[:, :-1]), tokens_BT[:, 1:])
    values_BWV = losses_BT[:, value_places()].reshape(64, WINDOW, SHOWN)
    return jnp.mean(values_BWV, axis=(0, 2)), jnp.sum(values_BWV * seen) / np.sum(seen)


def value_places() -> np.ndarray:
    """Where the losses of the values of a window stand: the place of the key that each follows."""
    return (np.arange(WINDOW)[:, None] * SIZE + np.arange(1, SIZE, 2)[None]).ravel()


def run_topics(options: Options) -> dict[str, Any]:
    """The four arms on topics: losses by place for every seed."""
    made = [topic_streams(options, seed) for seed in range(options.seeds)]
    result: dict[str, Any] = {"order": [quality for _, quality in made], "chance": math.log(VALUES), "arms": {}}
    for attend in SCOPES:
        say(f"topics: attention to the {attend}")
        lm = read_rows(transformer(TOPIC_MODEL), attend, attend)
        params = train(lm, [streams[order] for order in ORDERS for streams, _ in made], options.steps, 2e-3)
        places, answerable = (np.asarray(x) for x in jax.jit(jax.vmap(partial(value_losses, lm)))(params))
        for i, order in enumerate(ORDERS):
            mine = slice(i * options.seeds, (i + 1) * options.seeds)
            result["arms"][f"{order}, {attend}"] = {
                "by place": places[mine].tolist(), "answerable": answerable[mine].tolist()
            }  # fmt: skip
    return result


def text_config(options: Options) -> DataConfig:
    """Rows of posts."""
    vocabulary, length, rows = (512, 64, 2) if options.smoke else (2048, 512, 8)
    return DataConfig(
        sources={"posts": Files(options.text, heldout_percent=10)}, tokenizer=TrainedBPE(vocabulary), length=length,
        batch_size=rows, order="in_context",
    )  # fmt: skip


def post_groups(path: Path) -> list[str]:
    """The group of each post, by line."""
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        return [str(json.loads(line).get("group", "")) for line in lines if line.strip()]


def order_table(data: Data, config: DataConfig, groups: Sequence[str]) -> dict[str, Any]:
    """Quality of every kind of order, for every encoder at hand."""
    cache = data.caches["train"]["posts"]
    corpus, heldout = (
        corpus_of(data.caches[split]["posts"], data.tokenizer, f"posts/{split}") for split in data.caches
    )
    group = np.asarray([groups[int(cache.document_id(i).rpartition(":")[2]) - 1] for i in range(cache.documents)])
    found: dict[str, Any] = {}
    for name, encoder in {"hash_tfidf": config.in_context.encoder, "minilm": MiniLM()}.items():
        settings = replace(config.in_context, encoder=encoder)
        try:
            related = related_documents(settings, corpus, cache_root(config.cache_dir), heldout=heldout)
        except UserError as error:
            found[name] = {"skipped": str(error)}
            continue
        found[name] = {"documents": related.counts, "orders": {
            rule: _quality(replace(settings, **changes), corpus, related, group, config.length)
            for rule, changes in RULES.items()
        }}  # fmt: skip
    return found


def _quality(
    settings: InContextOrder, corpus: Corpus, related: Related, group: np.ndarray, length: int
) -> dict[str, float]:  # fmt: skip
    path = arrange(settings, corpus, related, length, 0)
    mine = group[related.kept[path]]
    return path_quality(path, related.graph, related.vectors_nD) | {"same group": float(np.mean(mine[1:] == mine[:-1]))}


def heldout_rows(data: Data, config: DataConfig, order: np.ndarray) -> Iterator[TokenBatch]:
    """Whole batches of held-out rows, documents in this order."""
    cache = data.caches["heldout"]["posts"]
    packing = lay_out(cache.tokens_N, cache.offsets, length=config.length, order=order)
    for begin in range(0, packing.rows, config.batch_size):
        numbers = range(begin, min(begin + config.batch_size, packing.rows))
        yield stack_rows([row_at(packing, i) for i in numbers], config.batch_size, config.length + 1)


def run_text(options: Options) -> dict[str, Any]:
    """The table of orders, and held-out losses of the four arms."""
    config = text_config(options)
    data = open_data(config)
    result: dict[str, Any] = {"orders": order_table(data, config, post_groups(Path(options.text))), "arms": {}}
    heldout = corpus_of(data.caches["heldout"]["posts"], data.tokenizer, "posts/heldout")
    related = order_documents(config.in_context, heldout, cache_root(config.cache_dir))
    rng = np.random.default_rng(0)
    rows = {"related": np.asarray(related.documents), "random": rng.permutation(np.asarray(related.documents))}
    chosen = np.asarray(data.orders["posts"].documents)
    model = replace(TEXT_MODEL, vocab_size=data.tokenizer.vocab_size)
    # The same documents in both orders: what is a copy, or near held-out text, is in neither.
    mixed = [np.random.default_rng(seed).permutation(chosen) for seed in range(options.text_seeds)]
    streams = [
        train_stream(replace(config, seed=seed), data.caches["train"], orders={"posts": order})
        for orders in (mixed, [chosen] * options.text_seeds)
        for seed, order in enumerate(orders)
    ]
    for attend in SCOPES:
        say(f"text: attention to the {attend}")
        lm = read_rows(transformer(model), attend, attend)
        params = train(lm, streams, options.text_steps, 3e-3)
        loss = mean_loss(lm)
        found = {kind: loss(params, heldout_rows(data, config, path)) for kind, path in rows.items()}
        for i, order in enumerate(ORDERS):
            mine = slice(i * options.text_seeds, (i + 1) * options.text_seeds)
            result["arms"][f"{order}, {attend}"] = {kind: values[mine] for kind, values in found.items()}
    return result


def mean_loss(lm: LM) -> Callable[[Params, Iterator[TokenBatch]], list[float]]:
    """Nats per token over batches, of every member of parameters [S, ...]."""
    evaluation = make_evaluation(next_token(lm))
    sums = jax.jit(jax.vmap(lambda params, batch: evaluation(params, batch, jax.random.key(0)).losses["next_token"],
                            (0, None)))  # fmt: skip

    def loss(params: Params, batches: Iterator[TokenBatch]) -> list[float]:
        total = jax.tree.map(lambda *x: sum(x), *(sums(params, batch) for batch in batches))
        return np.atleast_1d(np.asarray(jax.vmap(ratio_value)(total))).tolist()

    return loss


def run(options: Options) -> dict[str, Any]:
    """Both parts, or the one that is asked for."""
    check(options.only in ("", "topics", "text"), "--only", options.only, "topics or text")
    check(options.only != "text" or bool(options.text), "--text", options.text, "a file of posts")
    check(not options.text or Path(options.text).is_file(), "--text", options.text, "a file of posts")
    if options.smoke:
        options = replace(options, seeds=2, topics=40, steps=4, text_steps=2)
    result: dict[str, Any] = {"options": asdict(options)}
    if options.only != "text":
        result["topics"] = run_topics(options)
    if options.text and options.only != "topics":
        result["text"] = run_text(options)
    elif not options.text:
        result["text"] = {"skipped": "no posts were named (--text)"}
    return result


def table(result: dict[str, Any]) -> str:
    """All that was found, as text."""
    show = lambda values: f"{np.mean(values):.3f}" + (f" ±{np.std(values, ddof=1):.3f}" if len(values) > 1 else "")
    lines = []
    if "topics" in result:
        order = {key: float(np.mean([row[key] for row in result["topics"]["order"]])) for key in
                 result["topics"]["order"][0]}  # fmt: skip
        lines += [f"topics, related order: {', '.join(f'{key} {value:.3f}' for key, value in order.items())}",
                  f"loss on values; chance {result['topics']['chance']:.3f}",
                  f"{'order, attention':20s}" + "".join(f"{f'document {i + 1}':>15s}" for i in range(WINDOW))
                  + f"{'answerable':>15s}"]  # fmt: skip
        for name, arm in result["topics"]["arms"].items():
            places = "".join(f"{show(column):>15s}" for column in zip(*arm["by place"], strict=True))
            lines.append(f"{name:20s}{places}{show(arm['answerable']):>15s}")
    if "arms" in result.get("text", {}):
        for encoder, found in result["text"]["orders"].items():
            lines += ["", f"{encoder}: {found.get('skipped') or found['documents']}"]
            for rule, x in found.get("orders", {}).items():
                shown = (f"{key} {x[key]:.3f}" for key in ("similarity", "jumps", "ratio", "same group"))
                lines.append(f"  {rule:22s} {'  '.join(shown)}")
        lines += ["", f"{'held-out nats a token':24s}{'related rows':>18s}{'random rows':>18s}"]
        for name, arm in result["text"]["arms"].items():
            lines.append(f"{name:24s}{show(arm['related']):>18s}{show(arm['random']):>18s}")
    elif "skipped" in result.get("text", {}):
        lines.append(f"text: skipped, {result['text']['skipped']}")
    return "\n".join(lines)


def draw(result: dict[str, Any], path: Path) -> None:
    """Loss by place of the document; on real text held-out loss by arm."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from lmlab.report.plots import STYLE

    with rc_context(STYLE):
        figure = Figure(figsize=(10, 4), layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2)
        for name, arm in result.get("topics", {"arms": {}})["arms"].items():
            places = np.asarray(arm["by place"])
            style = "-" if name.endswith("row") else "--"
            left.errorbar(range(1, WINDOW + 1), places.mean(axis=0), places.std(axis=0, ddof=1), fmt=style + "o",
                          label=name, capsize=2, markersize=4)  # fmt: skip
        left.axhline(math.log(VALUES), color="#666666", linewidth=0.8)
        left.set(xlabel="document of the window", ylabel="loss on values, nats", xticks=range(1, WINDOW + 1))
        left.legend(fontsize=8)
        arms = result.get("text", {}).get("arms", {})
        for shift, kind in ((-0.2, "related"), (0.2, "random")):
            means = [np.mean(arm[kind]) for arm in arms.values()]
            right.barh(np.arange(len(means)) + shift, means, 0.35, label=f"{kind} rows")
        right.set(yticks=range(len(arms)), yticklabels=list(arms), xlabel="held-out nats a token")
        if arms:
            lowest = min(np.mean(values) for arm in arms.values() for values in arm.values())
            right.set_xlim(left=0.97 * lowest)
            right.legend(fontsize=8)
        figure.savefig(path, metadata={"Date": None})


def say(text: str) -> None:
    """Tell what is being done."""
    print(text, file=sys.stderr, flush=True)


def experiment(options: Options) -> int:
    """Run, write, print."""
    from lmlab.core.runtime import prepare

    prepare()
    result = run(options)
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(result, indent=2))
    draw(result, folder / "in_context.svg")
    print(table(result))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code, as `lmlab` does."""
    return exit_code(lambda: experiment(tyro.cli(Options, prog=NAME, args=argv)), NAME)


if __name__ == "__main__":
    sys.exit(main())
