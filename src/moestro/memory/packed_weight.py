"""The weight that a packed layer shows: computed from its bytes when it is asked for, to be read and not edited.

An edit in place of such a tensor would be lost in silence. `PackedWeight` refuses every operator that writes to it or
to a view of it; a weight is changed by assigning a new one, which the layer packs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..errors import ModelError
from ..planning.spelling import spelled


class PackedWeight(Tensor):
    """An unpacked copy of a packed weight, and views of it, that cannot be written to.

    What is computed from it is a plain tensor.

    Args:
        unpacked: the copy, which nothing else may hold. source: the packed bytes that it is of; None of a view.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    _unpacked: Tensor
    source: Tensor | None

    @staticmethod
    def __new__(cls, unpacked: Tensor, source: Tensor | None = None) -> PackedWeight:
        made: PackedWeight = Tensor._make_wrapper_subclass(
            cls,
            unpacked.size(),
            strides=unpacked.stride(),
            storage_offset=unpacked.storage_offset(),
            dtype=unpacked.dtype,
            device=unpacked.device,
        )
        made._unpacked, made.source = unpacked, source
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        if any(isinstance(value, PackedWeight) for value in _written(func, args, kwargs)):
            _refuse(func.__name__)
        args, kwargs = tree_map(_plain, (args, kwargs))
        out = func(*args, **kwargs)
        is_view = any(returned.alias_info is not None for returned in func._schema.returns)
        return tree_map(_kept, out) if is_view else out

    @property
    def data(self) -> Tensor:
        """The weight, which can as little be edited by this way."""
        return self.detach()

    @data.setter
    def data(self, value: Any) -> NoReturn:
        _refuse("data")

    def numpy(self, *, force: bool = False) -> np.ndarray[Any, Any]:
        """As an array of its own, which cannot be written to."""
        array: np.ndarray[Any, Any] = _plain(self).clone().numpy(force=force)
        array.flags.writeable = False
        return array

    def tolist(self) -> Any:
        """As lists of numbers."""
        return _plain(self).tolist()

    def apply_(self, *_: Any) -> NoReturn:
        """Refused."""
        _refuse("apply_")

    def map_(self, *_: Any) -> NoReturn:
        """Refused."""
        _refuse("map_")

    def share_memory_(self) -> NoReturn:
        """Refused."""
        _refuse("share_memory_")

    def untyped_storage(self) -> NoReturn:
        """Refused: what has the memory can write to it."""
        _refuse("what is done with its storage")

    def storage(self) -> NoReturn:
        """Refused, likewise."""
        _refuse("what is done with its storage")

    def data_ptr(self) -> NoReturn:
        """Refused, likewise."""
        _refuse("what is done at its address")

    def __dlpack__(self, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse("what is done with its memory")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PackedWeight({self._unpacked!r})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _plain(self).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Tensor:
        copied: Tensor = _plain(self).clone()
        return copied


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Any]:
    """The arguments that an operator writes to, those in lists one by one."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[place] if place < len(args) else kwargs.get(argument.name)
        yield from value if isinstance(value, list | tuple) else (value,)


def _plain(value: Any) -> Any:
    return value._unpacked if isinstance(value, PackedWeight) else value


def _kept(value: Any) -> Any:
    return PackedWeight(value) if isinstance(value, Tensor) else value


def _refuse(what: str) -> NoReturn:
    raise ModelError(
        f"{what} would edit a packed weight in place, which would be lost: assign a new one (layer.weight = ...), or "
        f"{keep_in_torch()}"
    )


def keep_in_torch() -> str:
    """What to do where a weight must be as torch has it."""
    return f"load the model with {spelled('pack_dense', False)}, which keeps dense layers in torch"
