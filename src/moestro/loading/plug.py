"""Moestro's plug-ins for Transformers: a quantizer that takes experts while a model loads, and an experts function.

`from_pretrained` builds the model without weights, and the quantizer has it planned for. Each expert tensor that loads
is packed into the store or a slot, and the model keeps nothing of it. A forward pass then calls `experts_forward` for
each MoE layer. Importing this file registers both under the name "moestro".

Legend: D model width, T tokens, K top-k.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from ..compute.eager import outside_of_graphs
from ..decode.capture import current_capture
from ..decode.dense import StoredWeight
from ..devices import Device, make_device
from ..engine.families import expert_modules
from ..errors import CheckpointError, ModelError, in_tensor, refuse_gradients
from ..planning.options import METHOD
from .build import ExpertLayer, attach, home, pack_rest
from .checkpoint import is_stored
from .config import MoestroConfig
from .timing import spent

logger = logging.getLogger("moestro")


@outside_of_graphs
def experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Transformers' experts interface: [..., D], [T, K], [T, K] -> [..., D].

    Raises:
        ModelError: the model was loaded without a `MoestroConfig`, so its experts are not in a store.
    """
    layer: ExpertLayer | None = getattr(module, "_moestro", None)
    if layer is None:
        raise ModelError(
            'experts_implementation="moestro" needs quantization_config=MoestroConfig(...) in from_pretrained, '
            "or use moestro.load"
        )
    layer.follow(module)
    refuse_gradients(hidden_states)
    refuse_gradients(top_k_weights)
    x = hidden_states if hidden_states.dim() == 2 else hidden_states.reshape(-1, hidden_states.shape[-1])  # [T, D]
    index = top_k_index[:, None] if top_k_index.dim() == 1 else top_k_index.flatten(0, -2)  # [T, K]
    weights = top_k_weights.reshape(index.shape)
    capture = current_capture()
    if capture is None:
        combined = layer.conductor.run_layer(layer.index, x, index, weights)
    else:
        combined = capture.run_layer(layer.conductor, layer.index, x, index, weights)
    return combined if hidden_states.dim() == 2 else combined.view(hidden_states.shape)


ALL_EXPERTS_FUNCTIONS.register(METHOD, experts_forward)


@register_quantizer(METHOD)
class MoestroQuantizer(HfQuantizer):  # type: ignore[misc]  # transformers is not typed
    """Takes each expert tensor as it loads, and packs the dense layers when all have loaded."""

    quantization_config: MoestroConfig

    def __init__(self, quantization_config: MoestroConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.pre_quantized = False  # a saved config says how a model was run; its weights are not quantized
        self.device: Device = make_device(quantization_config.device, quantization_config.link_gbps)
        self._layers: dict[str, ExpertLayer] = {}  # by the name of the experts module
        self._not_loaded: set[str] = set()  # expert parameters
        self._misshapen: list[str] = []
        self._unfit: list[CheckpointError] = []
        self._weights: Mapping[str, StoredWeight] = {}

    def update_device_map(self, device_map: dict[str, Any] | None) -> dict[str, Any]:
        # One device and no "cpu" beside it: other maps bring accelerate's hooks.
        return {"": self.device.torch_device}

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return self._owner(param_name) is not None

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        return float(param.element_size()) if self._owner(param_name) is None else 0.0

    def get_quantize_ops(self) -> ConversionOps:
        return _TakeExperts(self)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Keep expert tensors off the GPU while they load, by converters that run on the CPU."""
        names = sorted(self._not_loaded)
        for converter in weight_conversions:
            if isinstance(converter, WeightConverter):
                targets = tuple(target.replace("\\", "") for target in converter.target_patterns)
                converter.force_cpu |= any(name.endswith(targets) for name in names)
        # Where a checkpoint's tensors have the model's own names, no converter of the family matches them.
        leaves = sorted({".".join(name.split(".")[-2:]) for name in names})
        # The lookbehind keeps `experts.down_proj` from matching `shared_experts.down_proj.weight`.
        own = [WeightConverter(rf"(?<!\w){leaf}", leaf, [_AsItIs()], force_cpu=True) for leaf in leaves]
        return weight_conversions + own

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        for folder in {str(Path(file).parent) for file in kwargs.get("checkpoint_files") or ()}:
            if is_stored(folder):  # by a method that Transformers does not know, or it would have refused
                raise ModelError(
                    f"{folder} is quantized, which from_pretrained does not load with a MoestroConfig; "
                    f"use moestro.load({folder!r})"
                )
        attach(model, self.quantization_config, self.device)
        self._layers = {name: module._moestro for name, module in expert_modules(model).items()}
        self._not_loaded = {f"{n}.{part}" for n, layer in self._layers.items() for part in layer.layout.parameters}
        model.set_experts_implementation(METHOD)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self._unfit:
            raise self._unfit[0]
        if self._misshapen:
            raise CheckpointError(f"{self._misshapen[0]}; the checkpoint and its config.json do not belong together")
        if self._not_loaded:
            more = f" and {len(self._not_loaded) - 1} more expert tensors" if len(self._not_loaded) > 1 else ""
            raise CheckpointError(
                f"the checkpoint has no {min(self._not_loaded)}{more}; it is incomplete: download it again"
            )
        for name, layer in self._layers.items():
            module = model.get_submodule(name)
            for part in layer.layout.parameters:
                del module._parameters[part]
        weights, self._weights = self._weights, {}
        pack_rest(model, self.quantization_config, self.device, weights=weights)
        return model.requires_grad_(False)  # experts give no gradients, so gradients of other weights would be wrong

    def take(self, name: str, tensor: Tensor) -> None:
        """Pack one parameter of all experts of a layer into the store or slots.

        A wrong shape, or a weight that cannot be quantized, is noted for `_process_model_after_weight_loading`: an
        error raised here would reach the user inside Transformers' loading report.

        Args:
            name: of the parameter in the model.
            tensor: [experts, ...], as loaded.
        """
        owner = self._owner(name)
        assert owner is not None
        layer, part = owner
        expected = [layer.layout.experts, *layer.layout.parameters[part]]
        if list(tensor.shape) != expected:
            self._misshapen.append(f"{name} is {list(tensor.shape)} in the checkpoint, but {expected} by its config")
            return
        math = layer.conductor.math[layer.index]
        with spent("packing"):
            for expert in range(layer.layout.experts):
                packed = home(layer.conductor, layer.index, expert)
                try:
                    with in_tensor(f"{name} of expert {expert}"):
                        parts = layer.layout.parts(part, tensor[expert])
                        math.format.pack(packed, math.shape, parts, fast=self.quantization_config.skips_fit)
                except CheckpointError as error:
                    self._unfit.append(error)
                    return
        self._not_loaded.discard(name)
        logger.debug("packed %s of %d experts, %d bytes as loaded", name, layer.layout.experts, tensor.nbytes)

    def are_packed(self, weights: Mapping[str, StoredWeight]) -> None:
        """Say that all experts are packed, and which dense weights are packed from a checkpoint's own bytes."""
        self._not_loaded.clear()
        self._weights = weights

    def _owner(self, param_name: str) -> tuple[ExpertLayer, str] | None:
        """The layer that an expert parameter belongs to, and the parameter's name in it; None for other parameters."""
        module_name, _, part = param_name.rpartition(".")
        layer = self._layers.get(module_name)
        return None if layer is None or part not in layer.layout.parameters else (layer, part)

    @property
    def is_trainable(self) -> bool:
        return False

    def is_serializable(self) -> bool:
        return False


class _TakeExperts(ConversionOps):  # type: ignore[misc]  # transformers is not typed
    """Hands loaded expert tensors to the quantizer and returns nothing for the model to keep."""

    def __init__(self, quantizer: MoestroQuantizer) -> None:
        self._quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], *, missing_keys: set[str] | None = None, **_: Any) -> dict[str, Any]:
        for name in list(input_dict):
            value = input_dict.pop(name)
            self._quantizer.take(name, value[0] if isinstance(value, list) else value)
            if missing_keys is not None:
                missing_keys.discard(name)
        return {}


class _AsItIs(ConversionOps):  # type: ignore[misc]  # transformers is not typed
    """A conversion that changes nothing; it exists so that `force_cpu` can be asked for."""

    def convert(self, input_dict: dict[str, Any], target_patterns: list[str], **_: Any) -> dict[str, Any]:
        return dict(zip(target_patterns, input_dict.values(), strict=True))

    @property
    def reverse_op(self) -> ConversionOps:
        return self
