"""Compares what a survey of a model's headers finds with the model that is loaded from the same files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moestro.loading.survey import survey
from moestro.loading.survey.sizes import sized
from moestro.planning.options import ModelOptions, Options

CLOSE = 0.05  # of the bytes that are loaded


def same_bytes(path: Path | str, loaded: Any, **options: Any) -> None:
    """The survey's layers are the loaded model's, and its bytes outside the experts nearly so.

    Routers that a family keeps in float32 and positions that it makes itself are small, and in no file.
    """
    dtype = str(options.pop("dtype", "float32"))
    found = survey(str(path), ModelOptions(dtype=dtype), transcode=options.get("transcode") is not None)
    device = loaded.moestro.device
    planned = sized(found, Options(**options), on_gpu=not device.dense_is_packable).spec
    wanted = loaded.moestro.spec
    if any(math.format.orders for math in loaded.moestro.math):  # whose sizes no header says: which columns are ordered
        for ours, theirs in zip(planned.layers, wanted.layers, strict=True):
            assert (ours.experts, ours.neurons, ours.hidden) == (theirs.experts, theirs.neurons, theirs.hidden)
            assert abs(ours.expert_bytes - theirs.expert_bytes) <= CLOSE * theirs.expert_bytes
    else:
        assert planned.layers == wanted.layers
    assert abs(planned.dense_bytes - wanted.dense_bytes) <= CLOSE * wanted.dense_bytes
    assert abs(planned.dense_weights - wanted.dense_weights) <= CLOSE * wanted.dense_weights
