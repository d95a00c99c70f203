"""The Transformers side: a quantizer that takes experts while a model loads, and the experts function.

`from_pretrained` builds the model without weights, and `before_loading` finds its expert layers, plans and
makes the conductor; each expert tensor that loads is packed into its home and leaves nothing behind in the
model; a forward pass then calls `experts_forward` for each MoE layer. Knows how families write their
experts down; does not know where experts live.

Legend: E experts, D model width, F expert neurons, T tokens, K top-k.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from .compute.devices import Device, make_device
from .compute.experts import Activation, ExpertMath
from .conductor import PREFILL_TOKENS, Conductor
from .config import METHOD, MoestroConfig
from .errors import BudgetError, CheckpointError, ModelError, RequestError
from .machine import available_ram_bytes
from .memory.formats import FORMATS, ExpertFormat, ExpertShape
from .memory.slots import SlotPool
from .memory.store import ExpertStore
from .planning.budget import Budget, check_fits
from .planning.contract import LayerSpec, ModelSpec, Phase
from .planning.policies import make_policy

_FORMAT_OF = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def expert_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules whose experts go through Transformers' experts interface, by name, in model order."""
    return {name: module for name, module in model.named_modules() if _is_experts(module)}


def _is_experts(module: nn.Module) -> bool:
    # What `use_experts_implementation` sets on every instance of a class that it decorates.
    return all(hasattr(module, flag) for flag in ("has_gate", "has_bias", "is_transposed", "_is_expert_parallel"))


@dataclass(frozen=True, slots=True)
class FamilyLayout:
    """How one experts module writes its weights down, read off the module itself.

    transposed: weights are [E, in, out] instead of [E, out, in].
    interleaved: gate and up rows alternate instead of following one another.
    """

    experts: int
    shape: ExpertShape
    transposed: bool
    interleaved: bool

    @classmethod
    def of(cls, name: str, module: nn.Module) -> FamilyLayout:
        """Read the layout of an experts module.

        Raises:
            ModelError: the module keeps its weights in a way that is not known.
        """
        has_gate, transposed = bool(module.has_gate), bool(module.is_transposed)
        first = getattr(module, "gate_up_proj" if has_gate else "up_proj", None)
        down = getattr(module, "down_proj", None)
        if not isinstance(first, nn.Parameter) or not isinstance(down, nn.Parameter) or first.dim() != 3:
            raise ModelError(f"{name} ({type(module).__name__}) keeps its expert weights in a way not known here")
        experts, out_dim, in_dim = down.shape[0], *(down.shape[:0:-1] if transposed else down.shape[1:])
        rows = first.shape[2 if transposed else 1]
        if rows != in_dim * (2 if has_gate else 1):
            raise ModelError(f"{name}: {rows} rows of gate and up for {in_dim} neurons; no known layout")
        shape = ExpertShape(out_dim, in_dim, has_gate, bool(module.has_bias))
        return cls(experts, shape, transposed, has_gate and not module.is_concatenated)

    def parts(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """Views of one expert's part of a parameter, named and shaped as `ExpertShape.parts`.

        Args:
            name: the parameter's own name, e.g. "gate_up_proj".
            tensor: one expert of it: a matrix, or a bias [out].
        """
        kind, bias = name.removesuffix("_bias"), name.endswith("_bias")
        suffix = "_bias" if bias else ""
        rows = tensor if bias or not self.transposed else tensor.T  # [out, in] | [out]
        if kind != "gate_up_proj":
            return {kind.removesuffix("_proj") + suffix: rows}
        f = self.shape.neurons
        gate, up = (rows[0::2], rows[1::2]) if self.interleaved else (rows[:f], rows[f:])
        return {"gate" + suffix: gate, "up" + suffix: up}

    def activation(self, module: nn.Module) -> Activation:
        """The family's own gate, called with gate and up in the order that it expects them."""

        def apply(gate: Tensor | None, up: Tensor) -> Tensor:
            if gate is None:
                return module.act_fn(up)  # type: ignore[operator, no-any-return]
            both = torch.stack((gate, up), -1).flatten(-2) if self.interleaved else torch.cat((gate, up), -1)
            return module._apply_gate(both)  # type: ignore[operator, no-any-return]

        return apply


@dataclass(frozen=True, slots=True)
class ExpertLayer:
    """What our experts function finds on an experts module: its number and its conductor."""

    index: int
    layout: FamilyLayout
    conductor: Conductor


def experts_forward(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Transformers' experts interface: [..., D], [T, K], [T, K] -> [..., D].

    Raises:
        ModelError: the model was loaded without a `MoestroConfig`, so its experts are not ours.
    """
    layer: ExpertLayer | None = getattr(module, "_moestro", None)
    if layer is None:
        raise ModelError(
            'experts_implementation="moestro" needs quantization_config=MoestroConfig(...) in from_pretrained, '
            "or use moestro.load"
        )
    x = hidden_states.reshape(-1, hidden_states.shape[-1])  # [T, D]
    index = top_k_index.reshape(x.shape[0], -1)
    out = layer.conductor.run_layer(layer.index, x, index, top_k_weights.reshape(index.shape))
    return out.view(hidden_states.shape)


ALL_EXPERTS_FUNCTIONS.register(METHOD, experts_forward)


@register_quantizer(METHOD)
class MoestroQuantizer(HfQuantizer):  # type: ignore[misc]  # transformers is not typed
    """Takes each expert tensor as it loads; leaves every other weight to Transformers."""

    quantization_config: MoestroConfig

    def __init__(self, quantization_config: MoestroConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if self.pre_quantized:
            raise ModelError("this checkpoint was saved with Moestro's own config; load the original one")
        self.device: Device = make_device(quantization_config.device)
        self._layers: dict[str, ExpertLayer] = {}  # by the name of the experts module
        self._missing: set[str] = set()  # expert parameters that did not load yet

    def update_device_map(self, device_map: dict[str, Any] | None) -> dict[str, Any]:
        # One device and no "cpu" in it: other maps bring accelerate's hooks.
        return {"": self.device.torch_device}

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        return self._owner(param_name) is not None

    def param_element_size(self, model: nn.Module, param_name: str, param: Tensor) -> float:
        if self._owner(param_name) is not None:
            return 0.0
        return float(param.element_size())

    def get_quantize_ops(self) -> ConversionOps:
        return _TakeExperts(self)

    def update_weight_conversions(self, weight_conversions: list[Any], model: nn.Module) -> list[Any]:
        """Keep expert tensors off the GPU while they load, by converters that run on the CPU."""
        names = {f"{name}.{part}" for name, layer in self._layers.items() for part in _parameters(layer.layout)}
        for converter in weight_conversions:
            targets = [t.replace("\\", "") for t in getattr(converter, "target_patterns", ())]
            if isinstance(converter, WeightConverter) and any(n.endswith(t) for n in names for t in targets):
                converter.force_cpu = True
        # Where a checkpoint has them as the model does, no converter would match.
        leaves = sorted({".".join(name.split(".")[-2:]) for name in names})
        conversions = [WeightConverter(leaf, leaf, [_AsItIs()], force_cpu=True) for leaf in leaves]
        return weight_conversions + conversions

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        conductor = attach(model, self.quantization_config.budget, self.quantization_config.policy, self.device)
        self._layers = {name: module._moestro for name, module in expert_modules(model).items()}
        self._missing = {f"{n}.{p}" for n, layer in self._layers.items() for p in _parameters(layer.layout)}
        model.moestro = conductor
        model.set_experts_implementation(METHOD)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if self._missing:
            name, more = min(self._missing), len(self._missing) - 1
            raise CheckpointError(
                f"the checkpoint has no {name}{f' and {more} more expert tensors' if more else ''}; "
                "it is incomplete: download it again"
            )
        for module in expert_modules(model).values():
            module._parameters.clear()
        return model

    def take(self, name: str, tensor: Tensor) -> None:
        """Pack one parameter of all experts of a layer into their homes."""
        owner = self._owner(name)
        assert owner is not None
        layer, part = owner
        expected = (layer.layout.experts, *_parameters(layer.layout)[part])
        if tuple(tensor.shape) != expected:
            raise CheckpointError(f"{name} is {list(tensor.shape)} in the checkpoint, but the config says {list(expected)}")
        conductor, math = layer.conductor, layer.conductor.math[layer.index]
        for expert in range(layer.layout.experts):
            math.format.pack(home(conductor, layer.index, expert), math.shape, layer.layout.parts(part, tensor[expert]))
        self._missing.discard(name)

    def _owner(self, param_name: str) -> tuple[ExpertLayer, str] | None:
        module_name, _, part = param_name.rpartition(".")
        layer = self._layers.get(module_name)
        return None if layer is None or part not in _parameters(layer.layout) else (layer, part)

    @property
    def is_trainable(self) -> bool:
        return False

    def is_serializable(self) -> bool:
        return False


class _TakeExperts(ConversionOps):  # type: ignore[misc]  # transformers is not typed
    """Hands loaded expert tensors to the quantizer and returns nothing for the model to keep."""

    def __init__(self, quantizer: MoestroQuantizer) -> None:
        self._quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], *, missing_keys: set[str] | None = None, **kwargs: Any) -> dict[str, Any]:
        for name in list(input_dict):
            value = input_dict.pop(name)
            self._quantizer.take(name, value[0] if isinstance(value, list) else value)
            if missing_keys is not None:
                missing_keys.discard(name)
        return {}


class _AsItIs(ConversionOps):  # type: ignore[misc]  # transformers is not typed
    """A conversion that changes nothing; it exists so that `force_cpu` can be asked for."""

    def convert(self, input_dict: dict[str, Any], target_patterns: list[str], **kwargs: Any) -> dict[str, Any]:
        return dict(zip(target_patterns, input_dict.values(), strict=True))

    @property
    def reverse_op(self) -> ConversionOps:
        return self


def home(conductor: Conductor, layer: int, expert: int) -> Tensor:
    """The bytes where an expert lives from the start: uint8 in RAM, or in the slot that holds it."""
    if (layer, expert) in conductor.store:
        return conductor.store[layer, expert]
    size = conductor.spec.layers[layer].expert_bytes
    return conductor.slots[layer, expert][:size]


def attach(model: nn.Module, budget: Budget, policy_name: str, device: Device) -> Conductor:
    """Plan for a model without weights, make its conductor, and tell its experts modules.

    Raises:
        ModelError: no experts that we could take. BudgetError: it does not fit. RequestError: a GPU
        budget without a GPU.
    """
    modules = expert_modules(model)
    if not modules:
        raise ModelError(_why_no_experts(model))
    layouts = [FamilyLayout.of(name, module) for name, module in modules.items()]
    fmt = _format_of(model)
    layers = tuple(_layer_spec(layout, module, fmt) for layout, module in zip(layouts, modules.values(), strict=True))
    expert_ids = {id(p) for module in modules.values() for p in module.parameters(recurse=False)}
    tensors = [*model.parameters(), *model.buffers()]
    dense_bytes = sum(t.numel() * t.element_size() for t in tensors if id(t) not in expert_ids)
    spec = ModelSpec(layers, dense_bytes)

    policy = make_policy(policy_name)
    gpu_bytes = _gpu_bytes(budget, device)
    on_gpu = device.torch_device.type != "cpu"
    placement = policy.place(spec, max(0, gpu_bytes - (dense_bytes if on_gpu else 0)), {})
    ram_bytes = available_ram_bytes() if budget.ram_bytes is None else budget.ram_bytes
    check_fits(
        spec,
        placement,
        gpu_bytes=gpu_bytes,
        ram_bytes=ram_bytes,
        dense_on_gpu=on_gpu,
        named=budget.ram_bytes is not None,
    )
    slot_bytes = max(layer.expert_bytes for layer in layers)
    conductor = Conductor(
        spec=spec,
        placement=placement,
        math=[
            ExpertMath(layout.shape, fmt, layout.activation(module), _post_norm(module))
            for layout, module in zip(layouts, modules.values(), strict=True)
        ],
        policy=policy,
        device=device,
        store=ExpertStore([[layer.expert_bytes] * layer.experts for layer in layers], placement.held),
        slots=SlotPool(device.pool(len(placement.held) + placement.slots, slot_bytes), placement.held),
    )
    for index, (layout, module) in enumerate(zip(layouts, modules.values(), strict=True)):
        module._moestro = ExpertLayer(index, layout, conductor)
        module._is_hf_initialized = True  # there is nothing left in it for Transformers to initialize
    model.register_forward_pre_hook(_begin_step(conductor), with_kwargs=True)
    return conductor


def _begin_step(conductor: Conductor) -> Callable[..., None]:
    """A hook that tells the conductor that a step begins, and whether it reads a prompt."""

    def hook(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        tokens = kwargs.get("input_ids", args[0] if args else None)
        if tokens is None:
            tokens = kwargs.get("inputs_embeds")
        count = 1 if tokens is None else tokens.shape[1]
        cache = kwargs.get("past_key_values")
        past = 0 if cache is None else cache.get_seq_length()
        conductor.begin(count, Phase.PREFILL if past == 0 or count > PREFILL_TOKENS else Phase.DECODE)

    return hook


def _parameters(layout: FamilyLayout) -> dict[str, tuple[int, ...]]:
    """The family's own expert parameters: name -> shape of one expert of it."""
    shape = layout.shape
    d, f = shape.hidden, shape.neurons
    first, rows = ("gate_up_proj", 2 * f) if shape.has_gate else ("up_proj", f)
    weights = {first: (rows, d), "down_proj": (d, f)}
    if layout.transposed:
        weights = {name: (b, a) for name, (a, b) in weights.items()}
    biases = {f"{first}_bias": (rows,), "down_proj_bias": (d,)} if shape.has_bias else {}
    return weights | biases


def _layer_spec(layout: FamilyLayout, module: nn.Module, fmt: ExpertFormat) -> LayerSpec:
    return LayerSpec(
        experts=layout.experts,
        neurons=layout.shape.neurons,
        expert_bytes=fmt.expert_bytes(layout.shape),
        splittable=not module.has_post_expert_norm,
    )


def _post_norm(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """The family's norm behind each expert, usable wherever the expert was computed."""
    if not module.has_post_expert_norm:
        return None

    def norm(y: Tensor) -> Tensor:
        inner: nn.Module = module.post_expert_norm  # type: ignore[assignment]
        at = next(inner.parameters()).device
        return inner(y.to(at)).to(y.device)  # type: ignore[no-any-return]

    return norm


def _format_of(model: nn.Module) -> ExpertFormat:
    dtype = model.config.dtype or torch.get_default_dtype()
    if dtype not in _FORMAT_OF:
        raise RequestError(f"--dtype {dtype} is none that experts are stored in; use float32, float16 or bfloat16")
    return FORMATS[_FORMAT_OF[dtype]]


def _gpu_bytes(budget: Budget, device: Device) -> int:
    free_bytes = device.memory_bytes()
    if budget.gpu_bytes is None:
        return free_bytes
    if device.name == "cpu":
        raise RequestError("--gpu-memory was given, but there is no GPU to use; leave it out or use --device emulated")
    if device.name == "cuda" and budget.gpu_bytes > free_bytes:
        raise BudgetError(f"--gpu-memory {budget.gpu_bytes} bytes, but only {free_bytes} are free on the GPU")
    return budget.gpu_bytes


def _why_no_experts(model: nn.Module) -> str:
    config = model.config.get_text_config()
    counts = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    if any((getattr(config, name, None) or 0) > 1 for name in counts):
        return (
            f"the experts of {model.config.model_type} do not pass through Transformers' experts interface, so "
            "Moestro cannot take them; docs/models.md lists the families that work"
        )
    return f"{model.config.model_type} is a dense model: there are no experts to conduct; run it with Transformers"
