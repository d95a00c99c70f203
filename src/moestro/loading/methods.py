"""Adapt the public methods of Transformers' and torch's models to packed weights.

Most methods work unchanged. Those that would copy, move, convert or write packed weights are refused in one line, and
those that count or show weights include the packed ones. The table has a row for each method; a test fails on a method
without one.
"""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import PreTrainedModel

from ..decode.dense import Packed, PackedEmbedding
from ..engine.chunks import chunk_for
from ..engine.families import expert_modules
from ..errors import ModelError
from ..planning.options import METHOD

_WRITES = "its weights are packed for this machine; copy the original checkpoint"
_CONVERTS = "its weights are packed in one format and one place; load it again with dtype=, bits= or device="
_TRAINS = "Moestro is for inference, and gives no gradients"
_COPIES = "its weights are in memory that has one owner; load it again, or share it between threads"

# Why a method is refused.
REFUSED: dict[str, str] = {
    **dict.fromkeys(("dequantize", "push_to_hub", "save_distributed_checkpoint", "save_pretrained"), _WRITES),
    **dict.fromkeys(("bfloat16", "double", "float", "half", "to_empty", "type"), _CONVERTS),
    **dict.fromkeys(("activation_checkpointing_enable", "gradient_checkpointing_enable"), _TRAINS),
    "enable_input_require_grads": _TRAINS,
    **dict.fromkeys(("init_weights", "initialize_weights", "share_memory"), _COPIES),
    **dict.fromkeys(("maybe_distribute_model", "prepare_distribute_model"), _COPIES),
}


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Methods that `_Conducted` overrides, since they concern packed weights.
OURS = _names(
    """
    cpu cuda from_pretrained get_memory_footprint get_parameter get_parameter_or_buffer ipu mtia num_parameters
    resize_token_embeddings set_experts_implementation state_dict to xpu
    """
)

# Methods that work as in Transformers and torch.
SAME = _names(
    """
    activation_checkpointing_disable active_adapters add_adapter add_model_tags add_module adjust_generation_fn
    apply barrier_after_gathered_checkpoint_save buffers can_generate children compile compute_transition_scores
    config_class continuous_batching_context_manager delete_adapter destroy_cached_continuous_batching_manager
    disable_adapters disable_input_require_grads enable_adapters enable_peft_hotswap eval extra_repr forward
    gather_sharded_state_dict_for_save generate generate_batch generation_config_class get_adapter_state_dict
    get_buffer get_compiled_call get_correct_attn_implementation get_correct_experts_implementation get_decoder
    get_encoder get_expanded_tied_weights_keys get_experts_implementation get_extra_state get_init_context
    get_input_embeddings get_output_embeddings get_position_embeddings get_submodule gradient_checkpointing_disable
    heal_tokens init_continuous_batching init_parallel_plans is_backend_compatible is_custom_code is_remote_code
    load_adapter load_custom_generate load_state_dict mark_tied_weights_as_initialized modules named_buffers
    named_children named_modules named_non_persistent_buffers named_parameters parameters post_init
    prepare_inputs_for_generation register_backward_hook register_buffer register_for_auto_class
    register_forward_hook register_forward_pre_hook register_full_backward_hook register_full_backward_pre_hook
    register_load_state_dict_post_hook register_load_state_dict_pre_hook register_module register_parameter
    register_state_dict_post_hook register_state_dict_pre_hook requires_grad_ resize_position_embeddings
    retrieve_modules_from_names set_adapter set_attn_implementation set_decoder set_encoder set_extra_state
    set_input_embeddings set_output_embeddings set_submodule set_use_kernels should_save_on_this_rank smart_apply
    tie_weights train warn_if_padding_and_no_attention_mask zero_grad
    """
)


def give_methods(model: Any) -> None:
    """Give a loaded model, and the models inside it that have experts, the methods that the table says."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and expert_modules(module):
            family: Any = type(module)
            module.__class__ = _conducted(family)


@functools.cache
def _conducted(family: Any) -> Any:
    """The class of a family's loaded models. It has the family's name, by which Transformers looks things up."""
    refusals = {name: _refusal(name, why) for name, why in REFUSED.items() if hasattr(family, name)}
    return type(family.__name__, (_Conducted, family), {"__module__": family.__module__, "_family": family, **refusals})


def _refusal(name: str, why: str) -> Callable[..., NoReturn]:
    def refuse(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse(name, why)

    refuse.__name__ = name
    return refuse


def _refuse(name: str, why: str) -> NoReturn:
    raise ModelError(f"{name} is not for a model in Moestro's hands: {why}")


class _Conducted(nn.Module):
    """The methods that differ from a family's own; each takes the arguments of the method it overrides."""

    _family: Any

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Make a plain model of the family, without Moestro."""
        return cls._family(*args, **kwargs)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a model by the family's own `from_pretrained`."""
        return cls._family.from_pretrained(*args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "peft_config" and isinstance(value, dict):  # how the PEFT library says that it has put in adapters
            self._refuse_adapters_of_experts(value)
        super().__setattr__(name, value)

    def _refuse_adapters_of_experts(self, adapters: dict[str, Any]) -> None:
        stored = {name for module in expert_modules(self).values() for name in module._moestro.layout.parameters}
        for name, adapter in adapters.items():
            targets = getattr(adapter, "target_parameters", None) or ()
            if found := [target for target in targets if target.rpartition(".")[2] in stored]:
                _refuse(f"the adapter {name!r} of {found[0]}", "its experts' weights are packed in the store")

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Do nothing where the model is on that device and has that dtype already.

        Raises:
            ModelError: it is elsewhere, or has another dtype.
        """
        model: Any = self
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        there = device is None or (device.type == model.device.type and device.index in (None, model.device.index))
        if not there or dtype not in (None, model.dtype):
            _refuse("to", _CONVERTS)
        return model

    def cpu(self) -> Any:
        """Call `to` with "cpu"."""
        return self.to("cpu")

    def cuda(self, device: Any = None) -> Any:
        """Call `to` with a CUDA device."""
        return self.to(
            "cuda" if device is None else torch.device("cuda", device) if isinstance(device, int) else device
        )

    def ipu(self, device: Any = None) -> Any:
        """Call `to` with "ipu"."""
        return self.to("ipu")

    def mtia(self, device: Any = None) -> Any:
        """Call `to` with "mtia"."""
        return self.to("mtia")

    def xpu(self, device: Any = None) -> Any:
        """Call `to` with "xpu"."""
        return self.to("xpu")

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The weights that are torch tensors: neither packed layers nor experts. It refuses to be saved."""
        found = super().state_dict(*args, **kwargs)
        if args or kwargs.get("destination") is not None:
            return found
        part = _Part(found)
        part._metadata = getattr(found, "_metadata", None)
        return part

    def get_parameter(self, target: str) -> Any:
        """A parameter by name; for a packed layer an unpacked copy."""
        owner, _, leaf = target.rpartition(".")
        module = self.get_submodule(owner)
        is_packed = isinstance(module, Packed) and leaf in ("weight", "bias")
        if is_packed or leaf in getattr(type(module), "_stored", ()):
            return getattr(module, leaf)  # for experts, this raises an error that says where their weights are
        return super().get_parameter(target)

    def get_parameter_or_buffer(self, target: str) -> Any:
        """A parameter as `get_parameter` gives it, or a buffer."""
        owner, _, leaf = target.rpartition(".")
        if leaf in getattr(type(self.get_submodule(owner)), "_stored", ()):
            return self.get_parameter(target)
        return super().get_parameter_or_buffer(target)  # type: ignore[misc]

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """The number of weights, experts and packed layers included; none of these is trained."""
        count: int = super().num_parameters(only_trainable, exclude_embeddings)  # type: ignore[misc]
        if only_trainable:
            return count
        for layers in self._packed():
            if not (exclude_embeddings and any(isinstance(layer, PackedEmbedding) for layer in layers)):
                matrix = layers[0].matrix
                count += matrix.rows * matrix.columns
            count += sum(layer.matrix.rows for layer in layers if layer.matrix.bias is not None)
        experts: int = sum(module._moestro.layout.count for module in expert_modules(self).values())
        return count + experts

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of all weights: in torch, in packed layers, in the store in RAM, and in slots on the device."""
        used: int = super().get_memory_footprint(return_buffers)  # type: ignore[misc]
        for layers in self._packed():
            used += layers[0].matrix.packed.numel()
            used += sum(4 * layer.matrix.rows for layer in layers if layer.matrix.bias is not None)
        conductor = next(iter(expert_modules(self).values()))._moestro.conductor
        return used + int(conductor.store.n_bytes) + int(conductor.slots.memory.numel())

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """Resize by Transformers where the embedding is not packed.

        Raises:
            ModelError: it is packed.
        """
        model: Any = self
        if isinstance(model.get_input_embeddings(), Packed) and (args or kwargs):
            _refuse("resize_token_embeddings", "its embedding is packed; load it with pack_dense=False")
        return super().resize_token_embeddings(*args, **kwargs)  # type: ignore[misc]

    def set_experts_implementation(self, experts_implementation: Any) -> None:
        """Do nothing for "moestro".

        Raises:
            ModelError: another implementation, for which there are no weights.
        """
        wanted = experts_implementation
        if any(name != METHOD for name in (wanted.values() if isinstance(wanted, dict) else (wanted,))):
            _refuse("set_experts_implementation", f"its experts' weights are packed for {METHOD!r} alone")

    def _prefill(
        self, input_ids: torch.Tensor, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Read a prompt in chunks that memory has room for, where the request says nothing of chunks."""
        if generation_config.prefill_chunk_size is None:
            chunk = chunk_for(self, input_ids, model_kwargs)
            if chunk is not None:
                generation_config = copy.copy(generation_config)
                generation_config.prefill_chunk_size = chunk
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]

    def _packed(self) -> Iterator[list[Any]]:
        """The packed layers; those that share their bytes are in one list."""
        found: dict[int, list[Any]] = {}
        for module in self.modules():
            if isinstance(module, Packed):
                found.setdefault(module.matrix.packed.data_ptr(), []).append(module)
        yield from found.values()

    def __deepcopy__(self, memo: Any) -> NoReturn:
        _refuse("deepcopy", _COPIES)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        _refuse("pickle", _COPIES)


class _Part(OrderedDict[str, Any]):
    """A state dict without the experts, which refuses to be pickled: it is not the whole model."""

    _metadata: Any

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        _refuse("saving a state dict", _WRITES)
