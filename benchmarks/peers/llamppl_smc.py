"""llamppl's inference over a Hugging Face folder: seconds of a run for every line that it is told."""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.peers.torch_llama import core_count, import_torch
from lmlab.core.errors import UserError


def make_answer(
    folder: str, prompt: Sequence[int], allowed_V: np.ndarray, tokens: int
) -> Callable[[str, int, int], float]:  # fmt: skip
    """`answer(method, particles, children) -> seconds` of one run of `tokens` steps of the paper's masked program.

    As its documentation advises, queries of all particles are batched and the prompt's keys and values are kept;
    nothing else that was computed before is.
    """
    torch, _ = import_torch()
    try:
        from llamppl import CachedCausalLM, LMContext, Model, smc_standard, smc_steer
    except ImportError as error:
        raise UserError("peer", "llamppl", "llamppl 0.2.3 to be installed",
                        "Run `pip install genlm-backend llamppl==0.2.3`.") from error  # fmt: skip
    torch.set_num_threads(core_count())
    lm = CachedCausalLM.from_pretrained(folder, backend="hf", hf_opts={"dtype": torch.float32})
    allowed = set(np.flatnonzero(allowed_V).tolist())

    class Masked(Model):
        """Observe that the next token is allowed, draw it; end after so many."""

        def __init__(self) -> None:
            super().__init__()
            self.context = LMContext(lm, "")
            self.left = tokens

        async def start(self) -> None:
            self.context.tokens = list(prompt)
            self.context.next_token_logprobs = await lm.next_token_logprobs(self.context.tokens)

        async def step(self) -> None:
            await self.observe(self.context.mask_dist(allowed), True)
            await self.sample(self.context.next_token())
            self.left -= 1
            if not self.left:
                self.finish()

    def answer(method: str, particles: int, children: int) -> float:
        inner: Any = lm.model
        inner.batch_size = particles * (children if method == "steer" else 1)
        inner.clear_cache()
        began = time.perf_counter()
        inner.cache_kv(list(prompt))
        run = smc_steer(Masked(), particles, children) if method == "steer" else smc_standard(Masked(), particles)
        found = asyncio.run(run)
        seconds = time.perf_counter() - began
        if len(found) != particles or any(len(one.context.tokens) != len(prompt) + tokens for one in found):
            raise UserError("llamppl", len(found), f"{particles} particles of {tokens} tokens")
        return seconds

    return answer
