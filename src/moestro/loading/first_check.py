"""Refuse a model that cannot fit before any of its weights is fetched, and say what will be."""

from __future__ import annotations

import logging
import shutil
import sys
from dataclasses import replace

from ..devices import make_device
from ..errors import BudgetError, CheckpointError, ModelError
from ..planning.budget import format_bytes
from ..planning.options import ModelOptions, Options
from ..progress import is_quiet
from .choose import MANIFEST
from .download import SMALL_BYTES
from .hub import find_files, lacking_bytes
from .outlook import Choice, choose, place_of
from .survey import survey_files

logger = logging.getLogger("moestro")


def check_before_fetch(model: str, source: ModelOptions, options: Options) -> None:
    """Read the headers of weights that are on the hub alone, and refuse what surely has no room.

    What GPU memory activations take is measured once the model is built; here they count nothing.

    Raises:
        BudgetError: it does not fit, with the numbers; nothing of the weights was fetched.
    """
    wanted = find_files(model, source.revision)
    to_fetch = lacking_bytes(wanted)
    if wanted.root is not None or not to_fetch or options.clock == "virtual":
        return
    try:
        other = None if source.config is None else find_files(source.config, weights=False)
        found = survey_files(wanted, source, other=other, transcode=options.transcode is not None)
    except (ModelError, CheckpointError) as error:  # which is told where the model is loaded, if it is so
        logger.info("%s is not checked before it is fetched: %s", model, error)
        return
    device = make_device(options.device, options.link_gbps)
    place = place_of(
        replace(options, device="cpu", machine=None, gpu_memory=None) if device.accelerator is None else options
    )
    if device.accelerator is not None:
        free = device.memory_bytes()
        place = replace(place, free_gpu_bytes=max(free, options.budget.gpu_bytes or 0) if device.is_pretended else free)
    choice = choose(found, options, place, at_least=True)
    if choice.plan.why_not is not None:
        raise BudgetError(
            f"{model} was not downloaded ({format_bytes(to_fetch)}), since it would not fit: {choice.plan.why_not}"
        )
    if to_fetch >= SMALL_BYTES and not is_quiet():
        print(_in_words(model, choice, place.free_ram_bytes), file=sys.stderr, flush=True)
    kept_bytes = choice.disk_bytes - found.weights_bytes
    free_disk = shutil.disk_usage(wanted.cache if wanted.cache.exists() else wanted.cache.anchor).free
    if kept_bytes and MANIFEST not in wanted.sizes and to_fetch <= free_disk < to_fetch + kept_bytes:
        logger.warning(
            "%s: the disk has no room to keep the quantized weights too (%s after %s); they are made anew each time",
            *(model, format_bytes(kept_bytes), format_bytes(to_fetch)),
        )


def _in_words(model: str, choice: Choice, free_ram_bytes: int) -> str:
    gpu = f", {format_bytes(choice.gpu_bytes)} of GPU memory" if choice.plan.gpu is not None else ""
    return f"{model}: fits, {format_bytes(choice.ram_bytes)} of {format_bytes(free_ram_bytes)} free RAM{gpu}"
