"""Measure the memory that loading a checkpoint takes, by sampling the process every 10 ms.

Writes a random Mixtral checkpoint in that family's own format (a tensor for each matrix of each expert, a file for
each layer), loads it in a fresh process and samples that process's anonymous memory (RssAnon, which leaves out the page
cache). Runs on Linux only, since it reads /proc.

    moestro bench load --size 2GiB
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import MixtralConfig

from ..errors import RequestError
from ..machine.probe import available_ram_bytes
from ..planning.budget import check_ram, format_bytes
from .report import Report

SAMPLE_S = 0.010
_DISK_ROOM = 1.1  # of which a tenth stays free
PACKED_FACTOR, SPARE_LAYERS = 1.1, 1  # the limit: 1.1 x the packed experts + a layer of them

_CHILD = """
import json, sys
import moestro.loading.model  # which brings torch and Transformers
from moestro.loading.load import load
from moestro.loading.timing import process_s, timing
imports_s = process_s()
print("imported", flush=True)
sys.stdin.readline()
with timing() as times:
    model = load(sys.argv[1], device="cpu")
print(json.dumps({"imports_s": imports_s} | times.to_json()), flush=True)
"""


@dataclass(frozen=True, slots=True)
class LoadReport(Report):
    """Bytes of a load: the packed experts, one layer of them, and the peak above the imports.

    seconds: from the end of the imports to the end of the process. load: where they went, and what the imports took.
    """

    packed_bytes: int
    layer_bytes: int
    peak_bytes: int
    samples: int
    seconds: float
    load: Mapping[str, float] = field(default_factory=dict)

    @property
    def limit_bytes(self) -> int:
        """Bytes that the peak must stay under."""
        return int(PACKED_FACTOR * self.packed_bytes) + SPARE_LAYERS * self.layer_bytes

    @property
    def within_limit(self) -> bool:
        """Whether the peak stayed under the limit."""
        return self.peak_bytes < self.limit_bytes

    def to_json(self) -> dict[str, Any]:
        """All figures, the limit and whether it was kept, the machine and the commit."""
        return Report.to_json(self) | {"limit_bytes": self.limit_bytes, "within_limit": self.within_limit}

    def print(self) -> None:
        """Print the bytes beside their limit."""
        print(
            f"packed experts   {format_bytes(self.packed_bytes)} ({format_bytes(self.layer_bytes)} a layer)\n"
            f"peak of loading  {format_bytes(self.peak_bytes)} above the imports: "
            f"{self.peak_bytes / self.packed_bytes:.3f} x packed\n"
            f"limit            {format_bytes(self.limit_bytes)} ({PACKED_FACTOR} x packed + {SPARE_LAYERS} layer): "
            f"{'kept' if self.within_limit else 'EXCEEDED'}\n"
            f"{self.samples} samples in {self.seconds:.1f} s"
        )
        parts = (f"{name.removesuffix('_s').replace('_', '-')} {value:.2f} s" for name, value in self.load.items())
        print(", ".join(parts))


def measure_load(expert_bytes: int) -> LoadReport:
    """Load a checkpoint with at least `expert_bytes` bytes of experts and sample the memory.

    Raises:
        RequestError: there is no /proc here, the disk has no room, or the load failed.
        BudgetError: the model does not fit in RAM.
    """
    if not Path("/proc/self/status").exists():
        raise RequestError("memory is watched through /proc, which this system does not have; use Linux")
    config = MixtralConfig(
        vocab_size=256,
        hidden_size=1024,
        intermediate_size=3584,
        num_attention_heads=8,
        num_key_value_heads=2,
        dtype=torch.bfloat16,
    )
    one_layer_bytes = config.num_local_experts * 3 * config.hidden_size * config.intermediate_size * 2
    config.num_hidden_layers = max(4, -(-expert_bytes // one_layer_bytes))
    packed_bytes = config.num_hidden_layers * one_layer_bytes
    check_ram("loading that checkpoint", PACKED_FACTOR * packed_bytes, available_ram_bytes(), "give a smaller --size")
    with until_ended(), tempfile.TemporaryDirectory(prefix="moestro-load-") as folder:
        _check_disk(folder, packed_bytes)
        write_mixtral(Path(folder), config)
        peak_bytes, samples, seconds, load = _watch(folder)
    return LoadReport(packed_bytes, one_layer_bytes, peak_bytes, samples, seconds, load)


def _check_disk(folder: str, need_bytes: int) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if need_bytes * _DISK_ROOM > free_bytes:
        raise RequestError(
            f"a checkpoint of {format_bytes(need_bytes)} does not fit beside what else is in {tempfile.gettempdir()}, "
            f"where {format_bytes(free_bytes)} are free; give a smaller --size, or another place by TMPDIR"
        )


@contextmanager
def until_ended() -> Iterator[None]:
    """Within it SIGTERM ends the process by an exception, so that what was written for a while is removed."""
    if threading.current_thread() is not threading.main_thread():  # which alone may take signals
        yield
        return

    def end(number: int, _: Any) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def write_mixtral(folder: Path, config: MixtralConfig) -> None:
    """Write a random bf16 checkpoint under the names that Mixtral's authors use: w1, w2, w3 of each expert."""
    d, f, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    kv_rows = d // heads * config.num_key_value_heads
    weight_map: dict[str, str] = {}

    def save(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))

    def random(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).uniform_(-0.03, 0.03)

    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        tensors = {f"{layer}.self_attn.{name}_proj.weight": random(d, d) for name in ("q", "o")}
        tensors |= {f"{layer}.self_attn.{name}_proj.weight": random(kv_rows, d) for name in ("k", "v")}
        tensors |= {f"{layer}.{name}_layernorm.weight": random(d) for name in ("input", "post_attention")}
        tensors[f"{layer}.block_sparse_moe.gate.weight"] = random(config.num_local_experts, d)
        for expert in range(config.num_local_experts):
            for name, shape in (("w1", (f, d)), ("w2", (d, f)), ("w3", (f, d))):
                tensors[f"{layer}.block_sparse_moe.experts.{expert}.{name}.weight"] = random(*shape)
        save(f"model-layer-{i:03}.safetensors", tensors)
    ends = {"model.embed_tokens.weight": random(config.vocab_size, d), "model.norm.weight": random(d)}
    save("model-ends.safetensors", ends | {"lm_head.weight": random(config.vocab_size, d)})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config.architectures = ["MixtralForCausalLM"]
    config.save_pretrained(folder)


def _watch(folder: str) -> tuple[int, int, float, dict[str, float]]:
    """Load in a child process; returns the peak above its imports, the samples taken, the seconds and their parts."""
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    with child:
        if child.stdout.readline().strip() != "imported":
            raise RequestError("the loading process could not import moestro; run moestro doctor")
        before_bytes = anonymous_bytes(child.pid)
        start_s = time.perf_counter()
        child.stdin.write("go\n")
        child.stdin.close()
        peak_bytes, samples = before_bytes, 0
        while child.poll() is None:
            peak_bytes = max(peak_bytes, anonymous_bytes(child.pid))
            samples += 1
            time.sleep(SAMPLE_S)
        seconds = time.perf_counter() - start_s
        if not (printed := child.stdout.readline()):
            raise RequestError(f"the loading process failed with status {child.returncode}")
    return peak_bytes - before_bytes, samples, seconds, json.loads(printed)


def anonymous_bytes(pid: int) -> int:
    """Bytes of a process's anonymous memory (RssAnon), 0 once it has ended. Linux only."""
    for line in Path(f"/proc/{pid}/status").read_text("utf-8").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0  # the process has ended
