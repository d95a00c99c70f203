"""Dense layers: linears, head and embedding with packed weights, through our own kernels.

Attention projections, shared experts, the head and the embedding are swapped for packed ones after a model
has loaded, one matrix at a time, each original freed before the next is packed. On the CPU these are all of them; on a
GPU those that a checkpoint has quantized. Routers stay as they are: they are small, and a rounded router chooses other
experts. Experts stay where their conductor has them.

Legend: T tokens, R rows (outputs), K columns (inputs).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..compute import cpu, packed_ops
from ..compute.cpu import Matrix, first_touch, levels
from ..engine.families import expert_modules
from ..engine.gates import find_router
from ..errors import ModelError, in_tensor, refuse_gradients
from ..memory.formats import MatrixFormat
from ..memory.packed_weight import PackedWeight, keep_in_torch
from ..memory.store import map_memory, on_host


@dataclass(frozen=True, slots=True)
class DenseFormats:
    """How the dense layers are written down.

    other, head: of the output head and the embedding, and of the rest; None for what Transformers makes of them.
    stored: of weights that keep the form that their checkpoint has them in, by name; it goes before the others.
    """

    other: MatrixFormat | None
    head: MatrixFormat | None
    stored: Mapping[str, MatrixFormat] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """A weight that is packed from a checkpoint's own bytes.

    write: fills its panels, uint8 [matrix_bytes]. order: as in `Matrix`.
    """

    write: Callable[[Tensor], None]
    order: Tensor | None = None


class Packed(nn.Module):
    """What packed layers share: a weight that is packed when it is assigned.

    Reading it unpacks a copy, which refuses to be edited (memory/packed_weight.py). It is no parameter: it moves to no
    device and keeps the dtype that it was loaded with.

    matrix: the bytes, and a bias in float32.

    Args:
        is_shared: another layer has the same bytes.
        on_device: it computes by operations of torch, which a device's graphs can capture, where its bytes are.
    """

    matrix: Matrix
    weight_dtype: torch.dtype
    threads: int

    def __init__(
        self, matrix: Matrix, dtype: torch.dtype, threads: int, *, is_shared: bool = False, on_device: bool = False
    ) -> None:
        nn.Module.__init__(self)
        self.matrix, self.weight_dtype, self.threads = matrix, dtype, threads
        self._is_shared, self._on_device = is_shared, on_device

    @property
    def weight(self) -> Any:  # a Tensor; torch's layers, which share this class's methods, say a Parameter
        """[R, K], unpacked for code that looks at it; slow."""
        return PackedWeight(self.matrix.unpack(self.weight_dtype), self.matrix.packed)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            self._assign_weight(value)
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if name in ("weight", "bias"):
            raise ModelError(f"a packed {name} cannot be taken away; {keep_in_torch()}")
        super().__delattr__(name)

    def register_parameter(self, name: str, param: Any) -> None:
        """Refused for what parametrizations and pruning make of a weight, which would not be computed with."""
        raise ModelError(f"a packed layer takes no parameter {name}; {keep_in_torch()}")

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        """A copy is torch's own layer, with the weight unpacked."""
        copied = self._in_torch()
        copied.weight = nn.Parameter(self.matrix.unpack(self.weight_dtype), requires_grad=False)
        made: nn.Module = copied.train(self.training)
        memo[id(self)] = made
        return made

    def _in_torch(self) -> Any:
        """Torch's own layer of this size, without weights."""
        raise NotImplementedError

    def _assign_weight(self, value: Any) -> None:
        """Pack another weight. A layer that shares our bytes keeps the old one, as it would in torch."""
        if isinstance(value, PackedWeight) and value.source is self.matrix.packed:
            return  # tied once more
        if self._is_shared:  # fused layers see that the matrix is another
            own = replace(self.matrix, packed=torch.empty_like(self.matrix.packed))
            _pack(value, own)
            self.matrix, self._is_shared = own, False
        else:
            _pack(value, self.matrix)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing: Any,
        unexpected: Any,
        errors: Any,
    ) -> None:
        """Pack what a state dict has for this layer, for all layers that share its bytes."""
        loaders = self._loaders()
        for name, load in loaders.items():
            if (value := state_dict.get(prefix + name)) is not None:
                load(value)
            elif strict:
                missing.append(prefix + name)
        if strict:
            unexpected.extend(key for key in state_dict if key.startswith(prefix) and key[len(prefix) :] not in loaders)

    def _loaders(self) -> dict[str, Callable[[Any], None]]:
        """How each tensor that a state dict has for this layer is taken."""
        return {"weight": lambda value: _pack(value, self.matrix)}


class PackedLinear(Packed, nn.Linear):  # type: ignore[override]  # whose weight is a property here
    """A linear layer whose packed weights are read by our kernels."""

    def __init__(
        self,
        packed: Tensor,
        fmt: MatrixFormat,
        linear: nn.Linear,
        threads: int,
        *,
        order: Tensor | None = None,
        **where: bool,
    ) -> None:
        bias = None if linear.bias is None else linear.bias.detach().float().clone()
        matrix = Matrix(packed, fmt, linear.out_features, linear.in_features, bias, order)
        super().__init__(matrix, linear.weight.dtype, threads, **where)
        self.in_features, self.out_features = linear.in_features, linear.out_features

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """[R] or None; a copy, which refuses to be edited, like the weight."""
        bias = self.matrix.bias
        return None if bias is None else PackedWeight(bias.to(self.weight_dtype, copy=True))

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "bias":
            self._assign_bias(value)
        else:
            super().__setattr__(name, value)

    def _assign_bias(self, value: Any) -> None:
        bias = None if value is None else _checked(value, (self.out_features,)).float().clone()
        self.matrix = replace(self.matrix, bias=bias)  # fused layers see that the matrix is another

    def _loaders(self) -> dict[str, Callable[[Any], None]]:
        return super()._loaders() | ({} if self.matrix.bias is None else {"bias": self._assign_bias})

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., R]."""
        refuse_gradients(x)
        run = packed_ops.run_linear if self._on_device else cpu.run_linear
        return run(self.matrix, x, threads=self.threads)

    def _in_torch(self) -> nn.Linear:
        layer = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        if self.matrix.bias is not None:
            layer.bias = nn.Parameter(self.matrix.bias.to(self.weight_dtype, copy=True), requires_grad=False)
        return layer

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.matrix.fmt.name}"


class PackedEmbedding(Packed, nn.Embedding):  # type: ignore[override]  # likewise
    """An embedding that unpacks the rows it is asked for; may share its bytes with the head."""

    def __init__(
        self,
        packed: Tensor,
        fmt: MatrixFormat,
        embedding: nn.Embedding,
        threads: int,
        *,
        order: Tensor | None = None,
        **where: bool,
    ) -> None:
        if order is not None:
            raise ModelError("an embedding whose columns are stored in another order; use a checkpoint without it")
        matrix = Matrix(packed, fmt, embedding.num_embeddings, embedding.embedding_dim)
        super().__init__(matrix, embedding.weight.dtype, threads, **where)
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.padding_idx = embedding.padding_idx

    def forward(self, ids: Tensor) -> Tensor:
        """[...] -> [..., D]."""
        look_up = packed_ops.look_up if self._on_device else cpu.look_up
        return look_up(self.matrix, ids, self.weight_dtype, threads=self.threads)

    def _in_torch(self) -> nn.Embedding:
        return nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx, device="meta")

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.matrix.fmt.name}"


def _pack(value: Any, matrix: Matrix) -> None:
    """Write another weight, [R, K], into a matrix's bytes.

    Raises:
        ModelError: it does not fit, or nothing here quantizes to the format that the checkpoint has.
    """
    weight = _checked(value, (matrix.rows, matrix.columns))
    if not matrix.fmt.is_packable:
        raise ModelError(
            f"a layer that its checkpoint has in {matrix.fmt.name} takes no other weight; {keep_in_torch()}"
        )
    matrix.panels.copy_(matrix.fmt.pack(weight if matrix.order is None else weight[:, matrix.order]))


def _checked(value: Any, shape: tuple[int, ...]) -> Tensor:
    """A new weight or bias, on the CPU.

    Raises:
        ModelError: it is no tensor of floats of that shape.
    """
    fits = isinstance(value, Tensor) and value.is_floating_point() and not value.is_meta
    if not fits or tuple(value.shape) != shape:
        what = f"{value.dtype} of {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ModelError(
            f"a packed layer was given {what} for floats of {list(shape)}; give it a tensor of that shape, or "
            f"{keep_in_torch()}"
        )
    found: Tensor = value.detach().to("cpu", copy=isinstance(value, PackedWeight))
    return found


def dense_bytes(model: nn.Module, formats: DenseFormats | None) -> int:
    """Bytes that the weights outside the experts will take, packed ones as they are packed."""
    sizes = {key: t.numel() * t.element_size() for key, t in _dense_tensors(model).items()}
    if formats is not None:
        sizes |= {id(each.weight): each.n_bytes for each in packable(model, formats)}
    return sum(sizes.values())


def dense_weights(model: nn.Module) -> int:
    """How many weights there are outside the experts."""
    return sum(tensor.numel() for tensor in _dense_tensors(model).values())


def _dense_tensors(model: nn.Module) -> dict[int, Tensor]:
    """All tensors outside the experts by id, tied ones once."""
    experts = {id(p) for module in expert_modules(model).values() for p in module.parameters()}
    found = {id(t): t for t in (*model.parameters(), *model.buffers()) if id(t) not in experts}
    for target, source in getattr(model, "all_tied_weights_keys", {}).items():
        if (weight := _find(model, target)) is not _find(model, source):  # two tensors until they are tied
            found.pop(id(weight), None)
    return found


def pack_dense(
    model: nn.Module,
    formats: DenseFormats,
    threads: int,
    *,
    fast: bool = False,
    stored: Mapping[str, StoredWeight] | None = None,
    on: torch.device | None = None,
) -> None:
    """Swap the dense layers of a loaded model for packed ones.

    Args:
        threads: of the kernels. fast: as in `MatrixFormat.pack`.
        stored: weights that are not in the model, by the names that `packable` has for them.
        on: the device that computes them; None for the CPU's own kernels.
    """
    layers, stored = list(packable(model, formats)), stored or {}
    size, at = sum(_aligned(layer.n_bytes) for layer in layers), 0
    if on is None:
        memory = map_memory(size)
        first_touch(memory, threads)
    else:
        memory = torch.empty(size, dtype=torch.uint8, device=on)
    while layers:
        layer = layers.pop(0)
        packed = memory[at : at + layer.n_bytes]
        at += _aligned(layer.n_bytes)
        source = stored.get(layer.name)
        with in_tensor(layer.name):
            if source is None:
                layer.fmt.pack_blocks(layer.weight.detach()[None], packed[None], fast=fast)
            else:
                with on_host(packed) as target:
                    source.write(target)
        for name, module in layer.owners:
            parent, _, leaf = name.rpartition(".")
            kind = PackedEmbedding if isinstance(module, nn.Embedding) else PackedLinear
            order = None if source is None or source.order is None else source.order.to(memory.device)
            where = {"is_shared": len(layer.owners) > 1, "on_device": on is not None}
            new = kind(packed, layer.fmt, module, threads, order=order, **where)
            new.train(module.training)
            setattr(model.get_submodule(parent), leaf, new)
            module.weight = None  # code that still holds the module must not hold the weight
        del layer


@dataclass(slots=True)
class PackableLayer:
    """A weight to be packed, under its own name, and the modules that it belongs to by theirs."""

    name: str
    weight: Tensor
    fmt: MatrixFormat
    is_head: bool  # the output head or the embedding
    owners: list[tuple[str, Any]]

    @property
    def n_bytes(self) -> int:
        return self.fmt.matrix_bytes(*self.weight.shape)


def packable(model: nn.Module, formats: DenseFormats) -> Iterator[PackableLayer]:
    """Each weight outside the experts that is to be packed, once, whichever layers share it."""
    experts = expert_modules(model)
    routers = {id(router) for name in experts if (router := find_router(model, name)) is not None}
    left_alone = {id(m) for name in experts for m in experts[name].modules()} | routers
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[operator]
    tied = getattr(model, "all_tied_weights_keys", {})
    layers: dict[int, PackableLayer] = {}
    for name, module in model.named_modules():
        is_head = module is head or module is embedding
        if type(module) not in (nn.Linear, nn.Embedding) or id(module) in left_alone:
            continue
        if type(module) is nn.Embedding and (module is not embedding or module.max_norm is not None):
            continue
        weight_name = tied.get(f"{name}.weight", f"{name}.weight")
        weight = _find(model, weight_name)
        fmt = formats.stored.get(weight_name, formats.head if is_head else formats.other)
        if fmt is None or weight is None or not weight.is_floating_point():
            continue
        # Without kernels, what is not quantized is best left to torch.
        if not levels() and not fmt.is_quantized:
            continue
        layers.setdefault(id(weight), PackableLayer(weight_name, weight, fmt, is_head, [])).owners.append(
            (name, module)
        )
    users = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    for layer in layers.values():
        if users[id(layer.weight)] > len(layer.owners):
            continue  # shared with something that reads it in a way of its own
        if all(isinstance(module, nn.Embedding) for _, module in layer.owners) and not layer.fmt.is_quantized:
            continue  # a lookup is as fast as it gets
        yield layer


def _find(model: nn.Module, name: str) -> Tensor | None:
    owner, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(owner), leaf, None)


def _aligned(size: int) -> int:
    return -(-size // 64) * 64
