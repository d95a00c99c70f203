"""What this machine has: RAM, cores, CPU features. Asks the operating system; measures nothing."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import psutil


def total_ram_bytes() -> int:
    """RAM of the machine."""
    return int(psutil.virtual_memory().total)


def available_ram_bytes() -> int:
    """RAM that can be taken without swapping, within the control group's limit where there is one."""
    return min(int(psutil.virtual_memory().available), _cgroup_available_bytes(Path("/sys/fs/cgroup")))


def peak_ram_bytes() -> int:
    """The most RAM that this process held at once."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def major_faults() -> int:
    """Pages that this process had to wait for so far, from swap or from a file; 0 where the system does not say."""
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


def last_level_cache_bytes() -> int:
    """All caches of the CPU's last level together, as the kernel reports them; 64 MiB where it reports none."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    found: dict[tuple[int, str], int] = {}  # by level and the processors that share it
    for cache in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index*"):
        try:
            names = ("level", "size", "shared_cpu_list")
            level, size, shared = ((cache / name).read_text("utf-8").strip() for name in names)
            found[int(level), shared] = int(size[:-1]) * units[size[-1]]
        except (OSError, ValueError, KeyError):
            continue
    last = max((level for level, _ in found), default=0)
    return sum(size for (level, _), size in found.items() if level == last) or 64 * 2**20


def physical_cores() -> int:
    """Cores, not counting those that share one."""
    return psutil.cpu_count(logical=False) or psutil.cpu_count() or 1


class Gpu(NamedTuple):
    """A card as its driver describes it; sizes in bytes."""

    name: str
    driver: str
    total_bytes: int
    free_bytes: int


def nvidia_gpu() -> Gpu | None:
    """The first NVIDIA GPU that CUDA_VISIBLE_DEVICES does not hide; None where there is none.

    By the driver's own tool, since torch takes seconds to import.
    """
    tool, visible = shutil.which("nvidia-smi"), os.environ.get("CUDA_VISIBLE_DEVICES")
    if tool is None or (visible is not None and _first_of(visible) in ("", "-1")):
        return None
    fields = "index,uuid,name,driver_version,memory.total,memory.free"
    try:
        asked = [tool, f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
        lines = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=5).stdout.splitlines()
        return _chosen_gpu(lines, visible)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def _first_of(visible: str) -> str:
    return visible.split(",")[0].strip()


def _chosen_gpu(lines: Sequence[str], visible: str | None) -> Gpu | None:
    """The first card, or the one that CUDA_VISIBLE_DEVICES names first: its number, or how its id begins."""
    for line in lines:
        index, uuid, name, driver, total_mib, free_mib = (part.strip() for part in line.split(","))
        wanted = None if visible is None else _first_of(visible)
        if wanted is None or wanted == index or (wanted.startswith("GPU-") and uuid.startswith(wanted)):
            return Gpu(name, driver, int(total_mib) * 2**20, int(free_mib) * 2**20)
    return None


def cpu_model() -> str:
    """The CPU's own name."""
    if sys.platform == "darwin":
        named = _asked(["sysctl", "-n", "machdep.cpu.brand_string"])
    elif sys.platform == "win32":
        named = _registered(r"HARDWARE\DESCRIPTION\System\CentralProcessor\0", "ProcessorNameString")
    else:
        named = _cpuinfo().get("model name")
    return named or platform.processor() or platform.machine()


def _asked(command: list[str]) -> str | None:
    """What a command of the system prints; None where it has no answer."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def _registered(key: str, name: str) -> str | None:
    """A value that Windows' registry has of this machine; None where it has none."""
    registry: Any = import_module("winreg")
    try:
        with registry.OpenKey(registry.HKEY_LOCAL_MACHINE, key) as opened:
            return str(registry.QueryValueEx(opened, name)[0]).strip() or None
    except OSError:
        return None


def cpu_features() -> frozenset[str]:
    """The instruction sets that the CPU says it has, as the Linux kernel spells them; empty elsewhere."""
    cpuinfo = _cpuinfo()
    return frozenset(cpuinfo.get("flags", cpuinfo.get("Features", "")).split())


def cpu_quota() -> float | None:
    """CPUs that the control group may use at once; None without a limit."""
    return _cgroup_quota(Path("/sys/fs/cgroup"))


def ram_limit_bytes() -> int | None:
    """The most RAM that the control group may use; None without a limit."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        text = _text_of(Path("/sys/fs/cgroup") / name)
        if text.isdecimal() and int(text) < total_ram_bytes():
            return int(text)
    return None


def _cgroup_quota(root: Path) -> float | None:
    quota, _, period = _text_of(root / "cpu.max").partition(" ")
    if not quota:
        quota, period = (_text_of(root / "cpu" / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
    return int(quota) / int(period) if quota.isdecimal() and period.isdecimal() and int(period) else None


def _text_of(path: Path) -> str:
    try:
        return path.read_text("utf-8").strip()
    except OSError:
        return ""


def _cgroup_available_bytes(root: Path) -> int:
    """What a container may still take; its page cache can be given back, so it counts as available."""
    for limit, used, stat in (
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ):
        if (root / limit).exists() and (text := (root / limit).read_text("utf-8").strip()) != "max":
            stats = dict(line.split() for line in (root / stat).read_text("utf-8").splitlines())
            cache_bytes = int(stats.get("inactive_file", 0)) + int(stats.get("active_file", 0))
            return max(0, int(text) - int((root / used).read_text("utf-8")) + cache_bytes)
    return sys.maxsize


def _cpuinfo() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    first = path.read_text("utf-8").split("\n\n")[0] if path.exists() else ""
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
