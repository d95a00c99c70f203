"""Refuses decisions that cannot be carried out or would give a wrong result, live and in a replay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..errors import ContractError
from .contract import GPU0, RAM, Decision, Expert, LayerSpec, ModelSpec, Move, Step, View

_INF = float("inf")


def check(decision: Decision, step: Step, view: View, spec: ModelSpec) -> None:
    """Refuse a decision that would compute a neuron twice, never, or from a slot that is not there.

    Raises:
        ContractError: naming the policy's mistake, the layer and the expert.
    """
    layer, where = spec.layers[step.layer], f"layer {step.layer}"
    _check_shares(decision, step, layer, where)
    _check_drops(decision, step, where)
    arriving = check_moves(decision.moves, view, spec, where, step=step, decision=decision)
    for expert in decision.gpu:
        key = (step.layer, expert)
        if key not in arriving and view.ready_s(key, GPU0) == _INF:
            raise ContractError(f"{where}: expert {expert} is given to the GPU, but is not there nor on its way")
    for expert in decision.cpu:
        if view.ready_s((step.layer, expert), RAM) == _INF:
            raise ContractError(f"{where}: expert {expert} is given to the CPU, but has no copy in RAM")


def check_moves(
    moves: Iterable[Move],
    view: View,
    spec: ModelSpec,
    where: str,
    step: Step | None = None,
    decision: Decision | None = None,
) -> set[Expert]:
    """Refuse moves that cannot be carried out; `step` and `decision` are what they belong to.

    Returns:
        The experts that they bring.

    Raises:
        ContractError: naming the policy's mistake.
    """
    dropped = decision.drop if decision is not None else ()
    gone, brought = set(dropped), set[Expert]()
    parts: set[Expert] = set()  # of which only some neurons come
    empty: int | None = None  # slots, asked once
    gpu = decision.gpu if decision is not None else {}
    for move in moves:
        key = move.expert
        layer = key[0]
        _check_move(move, view, spec, where, step, gpu)
        if key in parts:
            raise ContractError(f"{where}: expert {key} is moved again, but only some neurons of it are on their way")
        if key in brought or (key not in gone and view.ready_s(key, GPU0) < _INF):
            continue  # it joins, and takes no slot
        if move.neurons is not None:
            parts.add(key)
        victim = move.evict
        if victim is None:
            if empty is None:
                empty = view.free_slots(move.to, layer) + sum(e in view.evictable(move.to, layer) for e in dropped)
            empty -= 1
            if empty < 0:
                raise ContractError(f"{where}: a move of expert {key} into an empty slot, but no more are empty")
        else:
            _check_victim(victim, move, view, where, step, decision, brought, gone)
            gone.add(victim)
            brought.discard(victim)
            parts.discard(victim)
        brought.add(key)
        gone.discard(key)
    return brought | gone  # an expert that is computed and then evicted had come as well


def _check_move(
    move: Move, view: View, spec: ModelSpec, where: str, step: Step | None, gpu: Mapping[int, range]
) -> None:
    layer, expert = move.expert
    if not (0 <= layer < len(spec.layers) and 0 <= expert < spec.layers[layer].experts):
        raise ContractError(f"{where}: a move of expert {move.expert}, which the model does not have")
    if move.to != GPU0:
        raise ContractError(f"{where}: a move to {move.to}, but only moves to gpu:0 can be carried out")
    if view.ready_s(move.expert, RAM) == _INF and view.ready_s(move.expert, GPU0) == _INF:
        raise ContractError(f"{where}: a move of expert {move.expert}, which has no copy in RAM")
    if move.neurons is not None:
        share = gpu.get(expert) if step is not None and layer == step.layer else None
        if move.keep or share is None or not set(share) <= set(move.neurons):
            raise ContractError(
                f"{where}: some neurons of expert {move.expert} are moved; that needs keep=False and a GPU share "
                "of this step within them"
            )


def _check_victim(
    victim: Expert,
    move: Move,
    view: View,
    where: str,
    step: Step | None,
    decision: Decision | None,
    brought: set[Expert],
    gone: set[Expert],
) -> None:
    computed = step is not None and decision is not None and victim[0] == step.layer and victim[1] in decision.gpu
    if victim in gone:
        raise ContractError(f"{where}: expert {victim} is evicted from {move.to} twice")
    ready_s = view.ready_s(victim, GPU0)
    if 0 < ready_s < _INF and victim not in brought:
        return  # the copy waits for the one in flight
    if computed:
        if victim in brought:
            return
        if ready_s == _INF:
            raise ContractError(f"{where}: expert {victim} is evicted before the move that brings it")
    if victim in brought or victim not in view.evictable(move.to, move.expert[0]):
        raise ContractError(f"{where}: expert {victim} is not evictable from {move.to}")


def _check_drops(decision: Decision, step: Step, where: str) -> None:
    for layer, expert in decision.drop:
        if layer == step.layer and expert in decision.gpu:
            raise ContractError(f"{where}: expert {expert} is given to the GPU and taken from it in one decision")


def _check_shares(decision: Decision, step: Step, layer: LayerSpec, where: str) -> None:
    """Refuse shares that do not tile each active expert's neurons."""
    gpu, cpu, whole = decision.gpu, decision.cpu, range(layer.neurons)
    if strangers := (gpu.keys() | cpu.keys()) - step.tokens.keys():
        raise ContractError(f"{where}: expert {min(strangers)} is computed, but no token was routed to it")
    for expert in step.tokens:
        on_gpu, on_cpu = gpu.get(expert), cpu.get(expert)
        if (on_gpu is None or on_cpu is None) and (on_gpu or on_cpu) == whole:
            continue  # as most are
        found = [share for share in (on_gpu, on_cpu) if share is not None]
        _check_tiling(found, layer, f"{where}, expert {expert}")


def _check_tiling(shares: Iterable[range], layer: LayerSpec, where: str) -> None:
    spans = sorted((share.start, share.stop) for share in shares)
    if len(spans) > 1 and not layer.splittable:
        raise ContractError(f"{where}: split, but a norm follows the expert, so its output is no sum over neurons")
    edge = 0
    for start, stop in spans:
        if start != edge or stop <= start:
            raise ContractError(f"{where}: neurons {start}..{stop} follow {edge}; every neuron needs one computer")
        if stop % layer.block and stop != layer.neurons:
            raise ContractError(f"{where}: split at neuron {stop}, not at a multiple of the block of {layer.block}")
        edge = stop
    if edge != layer.neurons:
        raise ContractError(f"{where}: neurons {edge}..{layer.neurons} have no computer")
