"""What a random model of the shape `tiny` says to prompts of several lengths in batches of several sizes."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from moestro import load

EXPERTS = 4 * 8  # of the shape `tiny`

Runs = tuple[tuple[int, int], ...]  # batch, tokens of each prompt


@torch.no_grad()
def logits_of(model: Any, runs: Runs, steps: int) -> list[torch.Tensor]:
    """Of each prompt, and of a few decode steps after it."""
    random = torch.Generator().manual_seed(0)
    found = []
    for batch, prompt in runs:
        ids = torch.randint(512, (batch, prompt + steps), generator=random)
        out = model(input_ids=ids[:, :prompt], use_cache=True)
        found.append(out.logits)
        for at in range(prompt, prompt + steps):
            out = model(input_ids=ids[:, at : at + 1], past_key_values=out.past_key_values, use_cache=True)
            found.append(out.logits)
    return found


@functools.cache
def reference(runs: Runs, steps: int) -> tuple[Sequence[torch.Tensor], Any]:
    """The same with all experts on the CPU and nothing fused, and the model's spec."""
    model = load(shape="tiny", dtype="float32", device="cpu", fuse=False)
    return logits_of(model, runs, steps), model.moestro.spec
