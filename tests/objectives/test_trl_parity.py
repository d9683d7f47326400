"""TRL's DPOTrainer beside ours, live: its losses on other numbers, and its log-probabilities of the same model.

`make parity` installs what this needs.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trl_peer

from lmlab.data.answers import lay_out_pairs
from lmlab.interop.huggingface import save_pretrained
from lmlab.models.transformer import transformer
from lmlab.objectives.pair_losses import PairScores
from lmlab.objectives.reward import preference_loss
from lmlab.reference import with_reference
from lmlab.testing.tiny import lively, random_pairs, tiny_config

pytest.importorskip("torch", reason="parity with TRL needs torch: make parity")
pytest.importorskip("trl", reason="parity with TRL needs trl: make parity")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("seed", [1, 2])
def test_losses_are_those_of_trl_s_trainers(seed):
    from test_pair_losses import TRL_NAMES

    inputs = trl_peer.random_scores(seed)
    wanted = trl_peer.all_losses(inputs)
    assert wanted.keys() == TRL_NAMES.keys()
    scores = PairScores(*map(jnp.asarray, inputs))
    for name, value in wanted.items():
        assert float(jnp.mean(TRL_NAMES[name](scores, trl_peer.BETA))) == pytest.approx(value, rel=1e-5, abs=1e-5), name


def test_log_probabilities_are_those_of_trl(tmp_path):
    import torch
    import transformers

    config = tiny_config(vocab_size=8)
    params = lively(transformer(config).init(jax.random.key(0)))
    save_pretrained(tmp_path, config, params, None)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    trainer = trl_peer.dpo_trainer(model, trl_peer.words(8), precompute_ref_log_probs=True)
    pairs = random_pairs(6, seed=4, vocab=7, longest=6)
    examples = [
        {"prompt_ids": pair.prompt.tolist(), "chosen_ids": pair.answers[0].tolist(),
         "rejected_ids": pair.answers[1].tolist()} for pair in pairs
    ]  # fmt: skip
    theirs = trainer.compute_ref_log_probs(trainer.model, trainer.data_collator(examples))
    ours = with_reference(lay_out_pairs(pairs, 32), transformer(config), params).reference_N2
    np.testing.assert_allclose(ours, np.stack([part.numpy() for part in theirs], axis=1), atol=1e-5, rtol=1e-5)


def test_the_reward_loss_is_trl_s():
    """Bradley and Terry with a margin, as TRL's RewardTrainer has it: -logsigmoid(chosen - rejected - margin)."""
    import torch

    rng = np.random.default_rng(0)
    chosen, rejected, margin = torch.from_numpy(rng.standard_normal((3, 20)).astype(np.float32))
    theirs = -torch.nn.functional.logsigmoid(chosen - rejected - margin).numpy()
    ours = preference_loss(jnp.asarray((chosen - rejected).numpy()), margins=jnp.asarray(margin.numpy()))
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
