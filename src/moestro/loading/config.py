"""What a user sets, and how it rides through `from_pretrained`.

AutoModelForCausalLM.from_pretrained(path, quantization_config=MoestroConfig(ram="48GiB"),
                                     experts_implementation="moestro")
"""

from __future__ import annotations

import os
from typing import Any

from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..devices import DEVICE_NAMES
from ..engine.families import METHOD
from ..errors import RequestError
from ..planning.budget import LEAST_CONTEXT, Budget, parse_gbps
from ..planning.machines import machine_names
from ..planning.policies import DEFAULT_POLICY, POLICIES

BITS = (16, 8, 4)
CLOCKS = ("wall", "virtual")


@register_quantization_config(METHOD)
class MoestroConfig(QuantizationConfigMixin):  # type: ignore[misc]  # transformers is not typed
    """Where a model's experts may live and who decides about them.

    Args:
        gpu_memory: the most GPU memory to use, like "12GiB"; None for 0.95 of what is free.
        context: tokens of prompt and answer that GPU memory is planned for, in one sequence; None for the model's own
            context, at most 4096. Of no use without a GPU, where memory is taken as it is needed.
        ram: the most RAM to use for weights; None for what is free.
        policy: a name from `moestro.planning.policies`.
        device: "auto", "cpu", "cuda" or "emulated".
        link: paces copies to the GPU, like "12GB/s", to see how a slower link would do; None for its own speed.
        machine: whose rates the policy reckons with, a name from `moestro.planning.machines`; None for this one's,
            measured when they are needed.
        clock: "wall", or "virtual": real results at the modelled speed of `machine`, on the emulated device.
        profile: a trace file (`moestro trace`) by which popular experts are placed; None for no preference.
        threads: CPU threads of our kernels; None for one on each physical core.
        bits: of the weights, 16, 8 or 4; None for the checkpoint's own dtype.
        expert_bits, dense_bits, head_bits: the same for experts, for dense layers, and for the output head
            with the embedding; None for `bits`.
        fuse: a decode step in few calls: on the CPU what is recognized is fused, on other devices a step with a static
            cache is recorded and replayed. What is changed after loading goes the original way.
        pack_dense: on the CPU, whether the dense layers are packed for our kernels. Packed weights can be assigned, not
            edited in place or resized; without it they stay in torch, in the checkpoint's dtype.

    Raises:
        RequestError: an amount, policy, device or number of bits that is none.
    """

    def __init__(
        self,
        *,
        gpu_memory: str | int | None = None,
        ram: str | int | None = None,
        context: int | None = None,
        policy: str = DEFAULT_POLICY,
        device: str = "auto",
        link: str | float | None = None,
        machine: str | None = None,
        clock: str = "wall",
        profile: str | None = None,
        threads: int | None = None,
        bits: int | None = None,
        expert_bits: int | None = None,
        dense_bits: int | None = None,
        head_bits: int | None = None,
        fuse: bool = True,
        pack_dense: bool = True,
        quant_method: str = METHOD,
    ) -> None:
        if policy not in POLICIES:
            raise RequestError(f"no policy {policy!r}; there are: {', '.join(sorted(POLICIES))}")
        if device not in DEVICE_NAMES:
            raise RequestError(f"no device {device!r}; there are: {', '.join(DEVICE_NAMES)}")
        self.budget = Budget.parse(gpu_memory=gpu_memory, ram=ram)
        if context is not None and context < LEAST_CONTEXT:
            raise RequestError(f"--context {context}: needs at least {LEAST_CONTEXT}, a token of prompt and of answer")
        self.policy, self.context = policy, context
        self.link_gbps = None if link is None else parse_gbps(link, "--link")
        if threads is not None and not 1 <= threads <= (os.cpu_count() or 1):
            raise RequestError(f"--threads {threads}: needs 1 to {os.cpu_count()}, the CPUs of this machine")
        for option, value in {
            "bits": bits,
            "expert-bits": expert_bits,
            "dense-bits": dense_bits,
            "head-bits": head_bits,
        }.items():
            if value is not None and value not in BITS:
                raise RequestError(f"--{option} {value}: there are {', '.join(map(str, BITS))}")
        if not pack_dense and not {dense_bits, head_bits} <= {None, 16}:
            raise RequestError("--dense-bits and --head-bits are for packed layers; leave them or --no-pack-dense out")
        if clock not in CLOCKS:
            raise RequestError(f"no clock {clock!r}; there are: {', '.join(CLOCKS)}")
        if clock == "virtual" and (device != "emulated" or machine is None):
            raise RequestError("--clock virtual needs --device emulated and --machine NAME, whose time it models")
        if machine is not None and machine not in machine_names():
            raise RequestError(f"no machine {machine!r}; there are: {', '.join(machine_names())}")
        self.device, self.machine, self.clock, self.profile = device, machine, clock, profile
        self.threads = threads
        self.fuse, self.pack_dense = fuse, pack_dense
        self.bits, self.expert_bits, self.dense_bits, self.head_bits = bits, expert_bits, dense_bits, head_bits
        self.quant_method = METHOD

    def to_dict(self) -> dict[str, Any]:
        """The arguments that make an equal config, for `config.json`."""
        return {
            "quant_method": METHOD,
            "gpu_memory": self.budget.gpu_bytes,
            "ram": self.budget.ram_bytes,
            "context": self.context,
            "policy": self.policy,
            "device": self.device,
            "link": self.link_gbps,
            "machine": self.machine,
            "clock": self.clock,
            "profile": self.profile,
            "threads": self.threads,
            "bits": self.bits,
            "expert_bits": self.expert_bits,
            "dense_bits": self.dense_bits,
            "head_bits": self.head_bits,
            "fuse": self.fuse,
            "pack_dense": self.pack_dense,
        }
