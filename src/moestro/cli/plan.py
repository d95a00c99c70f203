"""How `moestro plan` and `run --explain` print what a model needs before it is downloaded."""

from __future__ import annotations

from typing import Any

from ..console import print_lines, print_table
from ..loading.outlook import Choice, Outlook, command_of
from ..loading.reasons import machine_in_words, reasons, round_to
from ..machine.probe import physical_cores
from ..planning.budget import format_bytes

_GAINS = 4  # printed


def to_json(found: Outlook) -> dict[str, Any]:
    """All of it as plain values; what fits is told of the choice that the command names."""
    best, asked = found.best, found.choice
    return {
        "model": found.survey.model,
        "kind": found.survey.kind,
        "dtype": found.survey.dtype,
        **_figures(asked),
        "why_not": asked.plan.why_not,
        "command": command_of(found.survey, found.source, best.options) if best.fits else None,
        "experts": _experts(asked),
        "parts": {
            "experts": asked.plan.spec.expert_bytes,
            "dense": asked.dense_bytes,
            "kv_cache": asked.kv_bytes,
            "activations_estimated": asked.activation_bytes,
        },
        "context": asked.plan.context,
        "to_fetch_bytes": found.survey.fetched_bytes,
        "formats": {"experts": sorted({*asked.plan.formats.experts}), "dense": asked.plan.formats.dense},
        "table": [{"bits": bits, "fits": one.fits, **_figures(one)} for bits, one in found.table],
        "gains": [{"change": gain.change, "decode_tok_s": float(f"{gain.decode_tok_s:.3g}")} for gain in found.gains],
        "machine": {
            "name": found.place.machine.name,
            "text": machine_in_words(found.place),
            "here": found.place.is_here,
        },
        "reasons": reasons(found),
    }


def settled_by(found: Outlook) -> dict[str, Any]:
    """What the plan made of options that leave something to the model or the machine, by their names."""
    options, plan = found.choice.options, found.choice.plan
    device = options.device if options.device != "auto" else "cpu" if found.place.free_gpu_bytes is None else "cuda"
    return {
        "threads": options.threads or physical_cores(),
        "device": device,
        "policy": plan.policy,
        "dtype": found.survey.dtype,
        "context": plan.context,
        "machine": found.place.machine.name,
    }


def _figures(one: Choice) -> dict[str, Any]:
    speeds = one.speeds
    return {
        "verdict": one.verdict,
        "decode_tok_s": None if speeds is None else speeds.decode.rounded(),
        "prefill_tok_s": None if speeds is None else speeds.prefill.rounded(),
        "bytes": {"gpu": one.gpu_bytes, "ram": one.ram_bytes, "disk": one.disk_bytes},
    }


def _experts(one: Choice) -> dict[str, int]:
    held = len(one.plan.placement.held)
    total = sum(layer.experts for layer in one.plan.spec.layers)
    return {"total": total, "gpu": one.plan.slots, "held_on_gpu": held, "ram": total - held}


def print_outlook(found: Outlook) -> None:
    """The verdict, bytes by tier, the command, a table by bits, and what would help."""
    say = print_lines
    asked, best = found.choice, found.best
    say(f"{asked.verdict}  {found.survey.model}: {_speeds(asked) if asked.fits else asked.plan.why_not}")
    say(f"machine  {machine_in_words(found.place)}")
    counts = _experts(asked)
    where = f"{counts['gpu']} of {counts['total']} experts on the GPU at once" if asked.plan.gpu else "experts in RAM"
    tokens = f"{several} x {asked.plan.context}" if (several := asked.options.sequences) else f"{asked.plan.context}"
    sizes = (("GPU", asked.gpu_bytes), ("RAM", asked.ram_bytes), ("disk", asked.disk_bytes))
    say(f"bytes    {', '.join(f'{tier} {format_bytes(size)}' for tier, size in sizes)}; {where}")
    say(
        f"parts    experts {format_bytes(asked.plan.spec.expert_bytes)}, dense {format_bytes(asked.dense_bytes)}, "
        f"KV cache {format_bytes(asked.kv_bytes)} for {tokens} tokens, activations "
        f"{format_bytes(asked.activation_bytes)} (estimated)"
    )
    if found.survey.fetched_bytes:
        say(f"fetch    {format_bytes(found.survey.fetched_bytes)} are not on this machine yet")
    if best.fits:
        what = "run      " if asked.fits else "fits     "
        say(f"{what}{command_of(found.survey, found.source, best.options)}")
    else:
        say("run      nothing fits here: a smaller model, more RAM, or a checkpoint of fewer bits would")
    _print_table(found)
    for gain in found.gains[:_GAINS]:
        ratio = gain.decode_tok_s / gain.before_tok_s
        say(f"helps    {gain.change}: {round_to(gain.decode_tok_s)} tok/s ({ratio:.1f} x)")


def _speeds(one: Choice) -> str:
    assert one.speeds is not None
    decode, prefill = one.speeds.decode.rounded(), one.speeds.prefill.rounded()
    return f"decode {decode[0]:g} to {decode[1]:g} tok/s, prefill {prefill[0]:g} to {prefill[1]:g} tok/s"


def _print_table(found: Outlook) -> None:
    rows = []
    for bits, one in found.table:
        sizes = [format_bytes(size) if size else "-" for size in (one.gpu_bytes, one.ram_bytes, one.disk_bytes)]
        name = str(bits) if bits is not None else f"own ({'+'.join(dict.fromkeys(one.plan.formats.experts))})"
        speeds = ["-", "-"]
        if one.speeds is not None:
            speeds = [f"{s.rounded()[0]:g} - {s.rounded()[1]:g}" for s in (one.speeds.decode, one.speeds.prefill)]
        rows.append((name, one.verdict, *sizes, *speeds))
    columns = ("bits", "verdict", "GPU", "RAM", "disk", "decode tok/s", "prefill tok/s")
    print_table(columns, rows, left=("verdict",))


def print_reasons(found: Outlook, say: Any) -> None:
    """The plan as numbered reasons."""
    for number, reason in enumerate(reasons(found), start=1):
        say(f"{number}. {reason}")
