"""The benchmarks at toy size: what they compare is the same, they measure what they say, the last line is JSON."""

import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import (
    arms,
    attention,
    checkpoint,
    decode,
    gpu,
    loss,
    peers,
    scaling,
    timing,
    train_step,
)
from lmlab.core.errors import UserError
from lmlab.models.flops import training_flops_per_token

TOY = {"N_LAYERS": 1, "WIDTH": 32, "N_HEADS": 2, "HEAD_SIZE": 16, "FFN": 48, "VOCAB": 64, "BATCH": 2, "SEQ_LEN": 8}


@pytest.mark.parametrize("arm", ["lmlab", "nanodo_shape", "plain_jax"])
def test_an_arm_learns(arm, monkeypatch):
    for name, size in TOY.items():
        monkeypatch.setattr(peers, name, size)
    monkeypatch.setattr(peers, "LEARNING_RATE", 0.01)
    tokens_BT = np.random.default_rng(0).integers(0, peers.VOCAB, (peers.BATCH, peers.SEQ_LEN + 1)).astype(np.int32)
    with jax.numpy_rank_promotion("allow"):  # the peers are as their authors write
        step = train_step.make_step(arm, 0)
        losses = [step(tokens_BT) for _ in range(8)]
    assert losses[0] == pytest.approx(math.log(peers.VOCAB), rel=0.25)
    assert losses[-1] < losses[0] - 0.2


def test_the_report_ends_in_tokens_per_second(capsys):
    train_step.report({"lmlab": [1.0, 2.0, 1.5], "plain_jax": [3.0, 4.0, 3.5]}, load=0.5)
    out = capsys.readouterr().out
    tokens = peers.BATCH * peers.SEQ_LEN
    assert json.loads(out.splitlines()[-1]) == {"lmlab": round(tokens / 1.5), "plain_jax": round(tokens / 3.5)}
    assert "0.43x" in out


def test_decoding_is_told_in_tokens_per_second_and_ratios(capsys):
    seconds = {
        "llama 8": {"lmlab": [1.0, 2.0, 1.5], "transformers": [4.0, 4.0, 4.5]},
        "float32 1": {"lmlab": [1.0, 1.0], "transformers": [0.5, 0.5]},
    }
    decode.report(seconds)
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["lmlab_batch8"] == round(8 * decode.NEW / 1.5)
    assert last["ratio_batch8"] == 3.0  # the median of 4, 2 and 3
    assert last["float32_ratio_batch1"] == 0.5


def test_our_arm_of_decoding_draws_what_it_is_asked(monkeypatch):
    monkeypatch.setattr(decode, "NEW", 3)
    for name, small in {"N_LAYERS": 1, "WIDTH": 32, "FFN": 32, "N_HEADS": 2, "VOCAB": 64}.items():
        monkeypatch.setattr(peers, name, small)
    assert len(decode.work("lmlab", "")("llama 2")) == 1


def test_an_arm_that_dies_is_named(capsys, monkeypatch):
    dead = SimpleNamespace(stdin=io.StringIO(), stdout=io.StringIO(), kill=lambda: None)
    monkeypatch.setattr(arms, "start", lambda module, name, options: arms.Arm(name, dead))
    assert train_step.main(["--arms", "lmlab"]) == 2
    assert "'lmlab'" in capsys.readouterr().err


@pytest.fixture
def as_authors_write():
    """The peers, and the code around them, broadcast as JAX does by default."""
    with jax.numpy_rank_promotion("allow"):
        yield


def last_line(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_make_bench_runs_all_that_need_nothing():
    root = Path(__file__).resolve().parents[1]
    scripts = {path.stem for path in (root / "benchmarks").glob("*.py") if "__main__" in path.read_text()}
    called = re.findall(r"^\t\$\(BIN\)/python -m benchmarks\.(\w+)$", (root / "Makefile").read_text(), re.MULTILINE)
    # One needs a GPU, the other a model.
    assert sorted(called) == sorted(scripts - {"gpu", "harness"})


def test_arms_take_turns_and_the_first_round_is_not_counted(monkeypatch):
    calls, clock = [], iter(range(100))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(clock) ** 2))
    arms = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    seconds = timing.take_turns(arms, rounds=2)
    assert "".join(calls) == "ababab"
    # The clock reads n^2 at its nth look; the warm-up takes the looks 0 and 1.
    assert seconds == {"a": [9 - 4, 49 - 36], "b": [25 - 16, 81 - 64]}
    assert timing.median_ratio([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == 2.0


def test_relative_error_is_that_of_the_worst_leaf():
    wanted = {"a": jnp.ones((2, 2)), "b": jnp.array([3.0, 4.0])}
    assert timing.relative_error(wanted, wanted) == 0
    assert timing.relative_error(wanted | {"b": jnp.array([3.0, 4.5])}, wanted) == pytest.approx(0.1)
    assert not timing.relative_error(wanted | {"b": jnp.array([3.0, math.nan])}, wanted) < 1


ATTENTION = ["--lengths", "16", "--tokens", "32", "--head-size", "8", "--rounds", "1"]


def test_attention_compares_with_the_peer(capsys, as_authors_write):
    assert attention.main(ATTENTION) == 0
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    assert set(result) == {"ratio_16", "bytes_ratio_16", "ratio_packed_16", "bytes_ratio_packed_16"}
    assert min(result.values()) > 0
    rows = [line.split() for line in out.splitlines() if re.match(r" *2 x 16 ", line)]
    assert [" ".join(row[3:5]) for row in rows[:3]] == ["causal auto", "causal jax.nn", "causal reference"]
    assert rows[0][5] == "(xla)"
    assert "splash is left out: it needs a TPU" in out


def test_attention_that_computes_something_else_is_not_timed(monkeypatch, as_authors_write):
    wrong = lambda q, k, v, positions_BT, segments_BT=None: q
    monkeypatch.setattr(attention, "peer_attention", lambda implementation: wrong)
    with pytest.raises(RuntimeError, match=r"jax\.nn, forward.*differs"):
        attention.main(ATTENTION)


LOSS = ["--vocabularies", "64", "--chunks", "4", "16", "--rows", "2", "--length", "16", "--width", "8", "--rounds", "1"]


def test_loss_takes_less_memory_in_smaller_chunks(capsys, as_authors_write):
    assert loss.main(LOSS) == 0
    result = last_line(capsys)
    assert set(result) == {"ratio_64_4", "bytes_ratio_64_4", "ratio_64_16", "bytes_ratio_64_16"}
    assert result["bytes_ratio_64_4"] > result["bytes_ratio_64_16"]


def test_a_loss_with_another_gradient_is_not_timed(monkeypatch, as_authors_write):
    right = optax.softmax_cross_entropy_with_integer_labels
    off = lambda logits, labels: right(logits, labels) + jnp.mean(logits - jax.lax.stop_gradient(logits))
    monkeypatch.setattr(loss.optax, "softmax_cross_entropy_with_integer_labels", off)
    with pytest.raises(RuntimeError, match="chunk 4 of 64: differs"):
        loss.main(LOSS)


def test_checkpoint_times_every_part(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoint, "SIZES", {"tiny": (1, 8)})
    assert checkpoint.main(["--rounds", "1", "--folder", str(tmp_path)]) == 0
    tiny = last_line(capsys)["tiny"]
    parts = "save_blocking", "save_total", "restore", "verify", "numpy_save", "numpy_load"
    assert set(tiny) == {f"{part}_{unit}" for part in parts for unit in ("s", "mb_s")}
    assert tiny["save_total_s"] > tiny["save_blocking_s"] > 0
    assert list(tmp_path.iterdir()) == []


def test_no_float_of_the_checkpointed_state_is_constant():
    leaves = jax.tree.leaves(checkpoint.make_state(1, 8, 0))
    floats = [np.asarray(leaf) for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert len(floats) > 20
    assert all(np.unique(leaf).size == leaf.size or leaf.size > 1000 for leaf in floats)
    assert min(leaf.std() for leaf in floats) > 0.2


def without_torch(job):
    return gpu.work(job) if job.arm == "lmlab" else {"absent": "torch with CUDA"}


def test_gpu_runs_at_toy_size_on_a_cpu(capsys, monkeypatch):
    monkeypatch.setattr(gpu, "start", without_torch)
    assert gpu.main(["--toy"]) == 0
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    assert result["toy"]["mfu"] is None
    assert result["toy"]["lmlab"] > 0
    assert "torch_compile  left out, it needs torch with CUDA" in out
    first, last = map(float, re.findall(r"(\d+\.\d+) to (\d+\.\d+)", out)[0])
    assert first == pytest.approx(math.log(256), abs=0.1)
    assert last < first - 0.1


def test_gpu_says_what_it_needs(capsys, monkeypatch):
    monkeypatch.setattr(gpu, "start", without_torch)
    assert gpu.main(["--size", "124M"]) == 2
    assert "an accelerator that JAX sees" in capsys.readouterr().err
    assert gpu.main(["--steps", "0"]) == 2
    assert "--steps = 0" in capsys.readouterr().err


JOB = gpu.Job("lmlab", "124M", batch=8, length=1024, steps=5, remat="none", unroll=0, seed=0)


@pytest.mark.parametrize(("halve", "tried"), [(True, [8, 4, 2]), (False, [8])])
def test_a_batch_is_halved_until_it_fits(monkeypatch, halve, tried):
    seen = []

    def start(job):
        seen.append(job.batch)
        return {"batch": job.batch} if job.batch <= 2 else {"out_of_memory": "RESOURCE_EXHAUSTED"}

    monkeypatch.setattr(gpu, "start", start)
    assert ("batch" in gpu.fit(JOB, halve)) == halve
    assert seen == tried


@pytest.mark.parametrize(("text", "noticed"), [("RESOURCE_EXHAUSTED: 3 GiB", True), ("CUDA out of memory.", True),
                                               ("INVALID_ARGUMENT", False)])  # fmt: skip
def test_only_a_lack_of_memory_is_taken_for_one(monkeypatch, text, noticed):
    def steps(job):
        raise RuntimeError(text)

    monkeypatch.setattr(gpu, "lmlab_steps", steps)
    if noticed:
        assert gpu.work(JOB) == {"out_of_memory": text}
    else:
        with pytest.raises(RuntimeError, match=text):
            gpu.work(JOB)


def test_an_arm_that_dies_on_the_gpu_is_named(monkeypatch):
    dead = SimpleNamespace(returncode=1, stdout="")
    monkeypatch.setattr(gpu.subprocess, "run", lambda *args, **kwargs: dead)
    with pytest.raises(UserError, match="an arm torch_compile"):
        gpu.start(replace(JOB, arm="torch_compile"))


def test_mfu_is_the_share_of_the_peak(capsys):
    answer = {"batch": 8, "seconds": [0.5, 0.1, 0.2], "losses": [11.0, 10.0], "parameters": 10, "peak": 1e14,
              "device": "some chip"}  # fmt: skip
    result = gpu.report(JOB, {"lmlab": answer, "torch_compile": answer | {"seconds": [0.4]}})
    speed = 8 * 1024 / 0.2
    assert result["lmlab"] == round(speed)
    assert result["mfu"] == pytest.approx(speed * training_flops_per_token(JOB.config, 1024) / 1e14, abs=1e-4)
    assert result["torch_compile_mfu"] == pytest.approx(result["mfu"] / 2, abs=1e-4)
    assert "some chip, peak 100 TFLOP/s" in capsys.readouterr().out


@pytest.mark.parametrize(("size", "millions"), [("124M", 124), ("350M", 350), ("1.3B", 1300)])
def test_a_size_has_as_many_parameters_as_its_name_says(size, millions):
    from lmlab.models.transformer import transformer

    shapes = jax.eval_shape(transformer(replace(JOB, size=size).config).init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e6 == pytest.approx(millions, rel=0.02)


@pytest.mark.parametrize("axis", ["data", "fsdp", "tensor"])
def test_the_step_sends_little_more_than_it_must(axis, monkeypatch):
    sizes = {"vocab_size": 64, "layers": 3, "width": 64, "max_length": 32}
    for name, value in {"SIZES": sizes, "HEADS": 8, "FFN": 192, "LENGTH": 32}.items():
        monkeypatch.setattr(scaling, name, value)
    hlo, least = scaling.program(axis, 8)
    moved = sum(times * scaling.sent(kind, size, group) for kind, size, group, times in scaling.collectives(hlo))
    assert 0.99 * least[axis] < moved <= 1.25 * least[axis]


HLO = """
%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%body (carry: (s32[], f32[4,6])) -> (s32[], f32[4,6]) {
  %gathered = f32[4,6]{1,0} all-gather(%x), replica_groups=[2,4]<=[8], dimensions={0}
  %grad = (f32[2]{0}, /*index=1*/bf16[3]{0}) all-reduce(%y, %z), replica_groups={{0,1},{2,3}}, to_apply=%add
}

ENTRY %main (p: f32[4,6]) -> f32[4,6] {
  %loop = (s32[], f32[4,6]) while(%start), condition=%stop, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %part = f32[3]{0} reduce-scatter(%w), replica_groups=mesh['a'=2,'b'=3] {'b'}, dimensions={0}, to_apply=%add
}
"""


def test_collectives_are_read_off_a_program():
    found = list(scaling.collectives(HLO))
    assert found == [("all-gather", 96, 4, 5), ("all-reduce", 14, 2, 5), ("reduce-scatter", 12, 3, 1)]
    assert [scaling.sent(*each[:3]) for each in found] == [72, 14, 24]
    with pytest.raises(ValueError, match="groups=new"):
        scaling.group_size("all-gather(%x), groups=new")
