"""Engines that `bench/cpu.py` compares: each takes prompts and a number of new tokens and says when its tokens came."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel, StoppingCriteriaList

from ours import Measured


def _greedy(new: int, **more: Any) -> GenerationConfig:
    return GenerationConfig(do_sample=False, max_new_tokens=new, min_new_tokens=new, pad_token_id=0, **more)


class Generate:
    """`transformers`' own loop over a static batch of prompts of equal length."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        model.generation_config.eos_token_id = None

    def __call__(self, prompts: list[list[int]], new: int) -> Measured:
        """Runs all prompts as one batch; the clock is read where the loop asks whether to stop."""
        stamps: list[float] = []

        def stamp(ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
            stamps.append(time.perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool)

        ids = torch.tensor(prompts)
        begin = time.perf_counter()
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=_greedy(new),
            stopping_criteria=StoppingCriteriaList([stamp]),
        )
        times = [stamp - begin for stamp in stamps]
        return Measured(out[:, ids.shape[1] :].tolist(), [times] * len(prompts))


class Continuous:
    """`transformers`' continuous batching."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __call__(self, prompts: list[list[int]], new: int) -> Measured:
        """Runs all prompts at once. Start-up (cache, warm-up) is not counted: time begins with the first request."""
        settings = ContinuousBatchingConfig()
        # It would take nine tenths of the machine's memory, whatever the requests need.
        settings.num_blocks = sum(-(-(len(prompt) + new) // settings.page_size) for prompt in prompts) + 1
        found = self.model.generate_batch(
            prompts, generation_config=_greedy(new, eos_token_id=-1), continuous_batching_config=settings,
            record_timestamps=True, progress_bar=False,
        )  # fmt: skip
        outputs = [found[name] for name in sorted(found, key=lambda name: int(name.rpartition("_")[2]))]
        begin = min(output.created_time for output in outputs)
        times = [[t - begin for t in output.timestamps] for output in outputs]
        return Measured([output.generated_tokens for output in outputs], times)
