"""Why a plan is as it is, in sentences."""

from __future__ import annotations

import inspect
import sys

from ..planning.budget import format_bytes
from ..planning.model_config import experts_of
from ..planning.spelling import spelled
from .outlook import Choice, Outlook, Place


def machine_in_words(place: Place) -> str:
    """The machine, its rates, and what is free there."""
    costs, free = place.machine.costs, f"{format_bytes(place.free_ram_bytes)} of RAM free"
    if place.free_gpu_bytes is not None:
        free += f", {format_bytes(place.free_gpu_bytes)} on the GPU"
    rates = [f"RAM {costs.cpu_gbps:.0f} GB/s"] if costs.cpu_gbps else []
    rates += [f"link {costs.link_gbps:.0f} GB/s"] if costs.link_gbps else []
    rates += [f"GPU {costs.gpu_gbps:.0f} GB/s"] if costs.gpu_gbps else []
    kind = "measured"
    if not place.is_measured:
        kind = "not measured; `moestro machine` measures them in 20 s" if place.is_here else "not measured"
    return f"{place.machine.text} ({', '.join(rates)}, {kind}); {free}"


def round_to(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{float(f'{value:.3g}'):g}"


def reasons(found: Outlook) -> list[str]:
    """The plan in sentences, one decision each, in the order in which they follow from one another."""
    one = found.choice
    said = [_of_model(found), _of_form(found, one), f"The machine is {machine_in_words(found.place)}."]
    said += _of_gpu(one)
    said.append(_of_ram(one))
    said.append(_of_policy(one))
    said += _of_speed(found, one)
    said.append(_of_verdict(one))
    if found.gains:
        gain = found.gains[0]
        now, then = round_to(gain.before_tok_s), round_to(gain.decode_tok_s)
        said.append(f"What would help most is {gain.change}: {then} instead of {now} tok/s.")
    return said


def _of_model(found: Outlook) -> str:
    experts, chosen = experts_of(found.survey.text)
    layers = len(found.survey.layers)
    what = f"a {found.survey.config.get('model_type')} model with {layers} MoE layers"
    return f"{found.survey.model} is {what} of {experts} experts; each token is sent to {chosen} in each layer."


def _of_form(found: Outlook, one: Choice) -> str:
    formats, spec = one.plan.formats, one.plan.spec
    kept = (
        "kept as the files have them"
        if found.survey.stored
        else f"as {spelled('bits')} asks, or as the checkpoint has them"
    )
    dense = formats.dense or found.survey.dtype
    return (
        f"Experts are in {', '.join(dict.fromkeys(formats.experts))} ({kept}) and take "
        f"{format_bytes(spec.expert_bytes)}; all else is in {dense}, its head in "
        f"{formats.head or found.survey.dtype}, and takes {format_bytes(spec.dense_bytes)}."
    )


def _of_gpu(one: Choice) -> list[str]:
    if one.plan.gpu is None:
        return ["There is no GPU to use, so everything runs on the CPU."]
    gpu = one.plan.gpu
    total = sum(layer.experts for layer in one.plan.spec.layers)
    chunk = "" if gpu.chunk is None else f", read {gpu.chunk} tokens of a prompt at a time"
    return [
        f"Of {format_bytes(gpu.budget_bytes)} of GPU memory, {format_bytes(gpu.dense_bytes)} go to the dense part, "
        f"{format_bytes(gpu.kv_bytes)} to the KV cache of {gpu.context} tokens, {format_bytes(gpu.activation_bytes)} "
        f"to activations{chunk} (estimated), and {format_bytes(gpu.margin_bytes)} are kept back.",
        f"The rest holds {one.plan.slots} of {total} experts at once.",
    ]


def _of_ram(one: Choice) -> str:
    what = (
        "the experts that are not held on the GPU" if one.plan.gpu is not None else "experts, dense part and KV cache"
    )
    return f"RAM holds {what}: {format_bytes(one.ram_bytes)}."


def _of_policy(one: Choice) -> str:
    if not one.plan.slots:
        given = spelled("policy", one.plan.policy)
        return f"No expert is on a GPU, so the CPU computes all of them, whatever {given} would do."
    module = sys.modules[type(one.plan.decider).__module__]
    line = (inspect.getdoc(module) or "").split("\n")[0].rstrip(".")
    return f"The policy is {line}."


def _of_speed(found: Outlook, one: Choice) -> list[str]:
    speeds = one.speeds
    if speeds is None:
        return []
    costs = found.place.machine.costs
    hits = f"; {speeds.hit_rate:.0%} of them are expected on the GPU" if one.plan.slots else ""
    rate = f", which the RAM alone gives at {costs.cpu_gbps:.0f} GB/s" if costs.cpu_gbps and not one.plan.slots else ""
    decode, prefill = speeds.decode.rounded(), speeds.prefill.rounded()
    return [
        f"A decoded token reads {format_bytes(speeds.token_bytes)} of weights and cache{rate}{hits}. Most of its time "
        f"is that of {speeds.bound_by}: {decode[0]:g} to {decode[1]:g} tok/s.",
        f"A prompt of 512 tokens is read at {prefill[0]:g} to {prefill[1]:g} tok/s.",
    ]


def _of_verdict(one: Choice) -> str:
    if one.plan.why_not is not None:
        return f"It does not fit: {one.plan.why_not}."
    return f"It fits, and is {one.verdict} (FAST from 15 tok/s, GOOD from 7, USABLE from 2)."
