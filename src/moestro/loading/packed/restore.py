"""Load a packed folder: experts are read straight into the store, dense panels into theirs; nothing is quantized.

Transformers builds the model without weights from the folder's config.json; `loading/build.py` plans and allocates as
for any checkpoint.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...decode.dense import StoredWeight, packable
from ...devices import Device, device_class, make_device
from ...engine.conductor import Conductor
from ...engine.families import FamilyLayout, expert_modules
from ...errors import CheckpointError
from ...memory.formats import ExpertFormat, expert_format_named, format_named
from ...memory.store import on_host
from ...planning.options import METHOD
from ...progress import BYTES, Bar
from ..build import StoredFormats, attach, dense_formats, head_bits_of, home, pack_rest
from ..config import MoestroConfig
from ..stored import empty_model, take_generation_config
from .manifest import AGAIN, Asked, Dense
from .read import PackedFolder, runs_of
from .runs import RunReader, Wanted

ORDER = "moestro.order:"  # before a matrix's name, of its order of columns in rest.safetensors


def asked_bits(config: MoestroConfig) -> Asked:
    """What a config's options make of weights on its device; None where they leave them as they are."""
    expert = config.expert_bits or config.bits
    if not (device_class(config.device).dense_is_packable and config.pack_dense):
        return Asked(expert, transcode=config.transcode, fit=config.fit)
    return Asked(expert, config.dense_bits or config.bits, head_bits_of(config), config.transcode, config.fit)


def load_packed(
    folder: PackedFolder, hf_config: Any, auto: Any, config: MoestroConfig, dtype: Any, trust_remote_code: bool
) -> Any:
    """The model of a packed folder.

    Args:
        hf_config: the folder's. auto: the auto class that makes the model.
        dtype: that was asked for, a torch dtype; "auto" for the folder's.

    Raises:
        MoestroError: one line on what was found, what was needed and what to do.
    """
    device = make_device(config.device, config.link_gbps)
    asked_dtype = None if dtype == "auto" else str(dtype).removeprefix("torch.")
    folder.refuse_others(asked_bits(config), asked_dtype)
    made = getattr(torch, folder.manifest.dtype)
    model = empty_model(folder.model, auto, hf_config, made, trust_remote_code)
    model.set_experts_implementation(METHOD)
    experts = _expert_formats(folder, model)
    stored = StoredFormats(experts, _dense_kinds(folder, model))
    conductor = attach(model, config, device, stored)
    with folder.reader(conductor.cpu.threads) as reader:
        rest = folder.rest(reader)
        kept = _kept_weights(folder, model, rest, reader, _packed_names(model, config, device, stored))
        _fill_rest(folder, model, rest, device.torch_device)
        _fill_experts(folder, conductor, reader)
        model.initialize_weights()  # what it sets besides tensors; those that were read are marked
        model.tie_weights()
        for layer in expert_modules(model).values():
            for part in layer._moestro.layout.parameters:
                del layer._parameters[part]
        _check_filled(folder, model, kept)
        if folder.manifest.is_marked:
            for module in model.modules():
                if hasattr(module, "config"):
                    module.config._is_quantized = True
        pack_rest(model, config, device, stored=stored, weights=kept)
    take_generation_config(model, folder.folder)
    return model.requires_grad_(False).eval()


def _expert_formats(folder: PackedFolder, model: Any) -> list[ExpertFormat]:
    """The formats of the layers' experts.

    Raises:
        CheckpointError: the folder has other experts than the model of its config.
    """
    layers, modules = folder.manifest.layers, expert_modules(model)
    if [layer.module for layer in layers] != list(modules):
        names = [", ".join(names) for names in ([layer.module for layer in layers], modules)]
        raise _misfit(folder, f"experts of {names[0] or 'no module'}, where its config makes {names[1] or 'none'}")
    formats = []
    for layer in layers:
        layout = FamilyLayout.of(layer.module, modules[layer.module])
        shape = layout.shape
        fmt = _known(folder, expert_format_named, layer.format)
        found = (len(layer.experts), layer.hidden, layer.neurons, layer.has_gate, layer.has_bias)
        wanted = (layout.experts, shape.hidden, shape.neurons, shape.has_gate, shape.has_bias)
        sizes = {run.n_bytes for run in layer.experts}
        fits = fmt.divides(shape) and fmt.block == layer.block and sizes == {fmt.expert_bytes(shape)}
        if found != wanted or not fits:
            raise _misfit(folder, f"experts of {layer.module} in other shapes or sizes than its config makes them")
        formats.append(fmt)
    return formats


def _dense_kinds(folder: PackedFolder, model: Any) -> dict[str, Any]:
    """The formats of the packed matrices by name; the model's own parameters are given their dtypes.

    Raises:
        CheckpointError: a matrix does not belong to the model.
    """
    kinds = {}
    for one in folder.manifest.dense:
        owner, leaf = _place(folder, model, one.name)
        parameter = owner._parameters.get(leaf)
        fmt, dtype = _known(folder, format_named, one.format), getattr(torch, one.dtype, None)
        fits = parameter is not None and tuple(parameter.shape) == (one.rows, one.columns) and fmt.divides(one.rows)
        if not fits or not isinstance(dtype, torch.dtype) or one.run.n_bytes != fmt.matrix_bytes(one.rows, one.columns):
            raise _misfit(folder, f"{one.name} in another shape or size than its config makes it")
        assert parameter is not None
        if parameter.dtype != dtype:
            _set_shared(model, parameter, nn.Parameter(torch.empty_like(parameter, dtype=dtype), requires_grad=False))
        kinds[one.name] = fmt
    return kinds


def _packed_names(model: Any, config: MoestroConfig, device: Device, stored: StoredFormats) -> set[str]:
    """The matrices that stay packed on this device."""
    formats = dense_formats(model, config, device, stored)
    return set() if formats is None else {layer.name for layer in packable(model, formats)} & set(stored.dense)


def _kept_weights(
    folder: PackedFolder, model: Any, rest: dict[str, Tensor], reader: RunReader, packed: set[str]
) -> dict[str, StoredWeight]:
    """What reads each matrix that stays packed; the others are unpacked here and go to `rest`."""
    kept = {}
    for one in folder.manifest.dense:
        order = rest.pop(f"{ORDER}{one.name}", None)
        if one.order != (order is not None):
            raise _misfit(folder, f"{one.name} without its order of columns")
        if one.name in packed:
            owner, leaf = _place(folder, model, one.name)
            owner._parameters[leaf]._is_hf_initialized = True
            kept[one.name] = StoredWeight(functools.partial(_read_matrix, reader, one), order)
        else:
            rest[one.name] = _unpacked(reader, one, order)
    return kept


def _read_matrix(reader: RunReader, one: Dense, target: Tensor) -> None:
    reader.read([Wanted(one.run, one.name, target)])


def _unpacked(reader: RunReader, one: Dense, order: Tensor | None) -> Tensor:
    """A packed matrix as plain numbers, [rows, columns], in its dtype."""
    packed = torch.empty(one.run.n_bytes, dtype=torch.uint8)
    _read_matrix(reader, one, packed)
    fmt, dtype = format_named(one.format), getattr(torch, one.dtype)
    found: Tensor = fmt.unpack_matrix(packed, one.rows, one.columns, torch.float32).to(dtype)
    return found if order is None else torch.empty_like(found).index_copy_(1, order, found)


def _fill_rest(folder: PackedFolder, model: Any, rest: dict[str, Tensor], device: torch.device) -> None:
    """Give the model's parameters and buffers their values, taken out of `rest`."""
    owners = defaultdict(list)
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            owners[id(parameter)].append((module, leaf))
    while rest:
        name, value = rest.popitem()
        module, leaf = _place(folder, model, name)
        old = module._parameters.get(leaf)
        if (found := old if old is not None else module._buffers.get(leaf)) is None or found.shape != value.shape:
            raise _misfit(folder, f"{name} of {list(value.shape)}, which its config has no place for")
        value = value.to(device)
        if old is None:
            module._buffers[leaf] = value
            value._is_hf_initialized = True  # type: ignore[attr-defined]
            continue
        parameter = nn.Parameter(value, requires_grad=False)
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
        for owner, other in owners[id(old)]:
            owner._parameters[other] = parameter


def _set_shared(model: Any, old: nn.Parameter, new: nn.Parameter) -> None:
    """Put a parameter in the place of another in all modules that have it."""
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is old:
                module._parameters[leaf] = new


def _fill_experts(folder: PackedFolder, conductor: Conductor, reader: RunReader) -> None:
    wanted, on_device = list[Wanted](), list[Wanted]()
    for key, run, what in runs_of(folder.manifest):
        if isinstance(key, tuple):
            target = home(conductor, *key)
            (wanted if target.device.type == "cpu" else on_device).append(Wanted(run, what, target))
    total = sum(one.run.n_bytes for one in (*wanted, *on_device))
    with Bar("reading experts", total, BYTES) as bar:
        reader.read(wanted, bar.advance)
        for one in on_device:
            with on_host(one.target) as target:
                reader.read([Wanted(one.run, one.what, target)], bar.advance)


def _check_filled(folder: PackedFolder, model: Any, kept: Mapping[str, StoredWeight]) -> None:
    """Refuse a folder that lacks a tensor of the model.

    Raises:
        CheckpointError: naming it.
    """
    packed = {id(model.get_parameter(name)) for name in kept}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta and id(tensor) not in packed:
            raise _misfit(folder, f"no {name}, which its config makes")


def _place(folder: PackedFolder, model: Any, name: str) -> tuple[Any, str]:
    owner, _, leaf = name.rpartition(".")
    try:
        return model.get_submodule(owner), leaf
    except AttributeError:
        raise _misfit(folder, f"{name}, which its config has no place for") from None


def _known(folder: PackedFolder, find: Any, name: str) -> Any:
    try:
        return find(name)
    except KeyError:
        raise _misfit(folder, f"a format {name!r}, which is not known here") from None


def _misfit(folder: PackedFolder, found: str) -> CheckpointError:
    return CheckpointError(f"{folder.folder} has {found}; {AGAIN}")
