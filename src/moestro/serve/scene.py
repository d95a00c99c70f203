"""What a page shows of a running engine: what does not change, and what it does now. docs/live.md says what each is.

scene = Scene("demo", model, engine)
scene.opening()["shape"]    # {"layers": 6, "experts": [8, 8, 8, 8, 8, 8], "top_k": 2}
scene.close()

Looking at it costs the model next to nothing, and nothing before it is made and after it is closed.
"""

from __future__ import annotations

import base64
from time import perf_counter, time
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from ..compute.cpu import best_level
from ..engine.counters import RoutingCounts
from ..machine.probe import cpu_model, ram_limit_bytes, total_ram_bytes
from ..planning.model_config import experts_of, text_of
from .engine import Engine, Progress

HALF_LIFE_S = 20.0  # of the routing counts
DISK, RAM, GPU, ARRIVING = range(4)  # the upper two bits of a cell
_LEVELS, _PER_OCTAVE = 63, 5.0


class Scene:
    """Looks at an engine and its model.

    Args:
        name: of the model.
    """

    def __init__(self, name: str, model: Any, engine: Engine) -> None:
        self._name, self._model, self._engine = name, model, engine
        self._conductor: Any = model.moestro
        self._experts = [layer.experts for layer in self._conductor.spec.layers]
        self._firsts = np.cumsum([0, *self._experts])[:-1]
        self._counts = RoutingCounts(self._experts)
        self._seen = np.zeros(sum(self._experts))  # of the counts
        self._heat = np.zeros(sum(self._experts))
        self._process = psutil.Process()
        self._rates = [0.0, 0.0]
        self._conductor.accounts.routing = self._counts
        self._last: dict[str, float] | None = None

    def close(self) -> None:
        """Stop counting."""
        if self._conductor.accounts.routing is self._counts:
            self._conductor.accounts.routing = None

    # What does not change.

    def opening(self) -> dict[str, Any]:
        """What does not change while the model serves."""
        conductor, engine = self._conductor, self._engine
        accelerator = conductor.device.accelerator
        config = self._model.config
        _, top_k = experts_of(text_of(config.to_dict()))
        compiled = sum(conductor.cpu.kernel(math) is not None for math in conductor.math)
        return {
            "model": self._name,
            "family": config.model_type,
            "shape": {"layers": len(self._experts), "experts": self._experts, "top_k": top_k or None},
            "formats": sorted({math.format.name for math in conductor.math}),
            "policy": conductor.policy.name,
            "machine": {
                "cpu": cpu_model(),
                "threads": conductor.cpu.threads,
                "kernels": best_level() if compiled else "plain torch",
                "ram_bytes": ram_limit_bytes() or total_ram_bytes(),
                "gpu": None if accelerator is None else conductor.device.card_name,
            },
            "lanes": self._lanes(),
            "plan": self._plan(),
            "memory": self._memory(),
            "uncounted": self._uncounted(),
            "batching": engine.batching,
            "max_requests": engine.max_requests,
            "context": engine.context,
            "queue": engine.queue,
            "half_life_s": HALF_LIFE_S,
        }

    def _lanes(self) -> dict[str, Any]:
        """Of each lane what it does, and whether there is one whose work can be told."""
        accelerator = self._conductor.device.accelerator
        if accelerator is None:
            no_gpu = {"is_there": False, "what": "there is no GPU here"}
            return {
                "gpu": no_gpu,
                "link": {"is_there": False, "what": "there is no GPU here that experts could be brought to"},
                "cpu": {"is_there": True, "what": "computes all of each step"},
            }
        knows = accelerator.busy_share() is not None
        what = "computes what lies in its memory"
        if accelerator.is_pretended:
            what += "; it is pretended, so its speed means nothing"
        elif not knows:
            what = "its driver does not say how busy it is; pip install nvidia-ml-py lets it"
        return {
            "gpu": {"is_there": knows, "what": what},
            "link": {"is_there": True, "what": "brings experts from RAM to the GPU"},
            "cpu": {"is_there": True, "what": "computes experts that are not on the GPU"},
        }

    def _plan(self) -> list[str]:
        """What lies where and why, in sentences."""
        conductor, n = self._conductor, sum(self._experts)
        if conductor.device.accelerator is None:
            lines = [f"All {n} experts lie in RAM, and the CPU computes every layer."]
        else:
            held, slots = len(conductor.slots.held), len(conductor.slots)
            there = f"{held} of {n} experts stay on the GPU for good; " if held else ""
            others = "the others" if held else f"all {n} experts"
            shared = f"{slots - held} slots there are" if held else f"{slots} slots on the GPU are"
            lines = [
                f"{there}{shared} shared by {others}, which lie in RAM.",
                f"At each layer the policy {conductor.policy.name} decides which experts come over the link and which "
                "the CPU computes where they lie.",
            ]
        if conductor.gpu_plan is not None:
            lines.append(conductor.gpu_plan.in_words() + ".")
        engine = self._engine
        batching = "" if engine.batching == "batched" else f" ({engine.batching.partition(': ')[2]})"
        many = (
            f"Up to {engine.max_requests} requests of {engine.context} tokens each are answered together, in one step"
        )
        one = f"One request of {engine.context} tokens is answered at a time{batching}"
        return [*lines, f"{many if engine.max_requests > 1 else one}; {engine.queue} more may wait."]

    def _memory(self) -> list[dict[str, Any]]:
        """Each tier with its limit and what of it is given out for good."""
        conductor, engine, plan = self._conductor, self._engine, self._conductor.gpu_plan
        ram = {"experts": conductor.store.n_bytes}
        if plan is None:
            ram |= {"dense weights": conductor.spec.dense_bytes, "keys and values": engine.kv_bytes}
        tiers = [
            {
                "tier": "ram",
                "limit_bytes": conductor.ram_budget_bytes or ram_limit_bytes() or total_ram_bytes(),
                "parts": _parts(ram),
            }
        ]
        if conductor.device.accelerator is not None:
            gpu = {"experts": len(conductor.slots) * conductor.spec.slot_bytes}
            if plan is not None:
                gpu |= {
                    "dense weights": plan.dense_bytes,
                    "keys and values": plan.kv_bytes,
                    "activations": plan.activation_bytes,
                    "margin": plan.margin_bytes,
                }
            limit = None if plan is None else plan.budget_bytes
            tiers.insert(0, {"tier": "gpu", "limit_bytes": limit, "parts": _parts(gpu)})
        return tiers

    def _uncounted(self) -> list[int]:
        """Layers of which the host sees no choices, since all their experts are on the GPU for good."""
        conductor, dtype = self._conductor, self._model.dtype
        return [at for at in range(len(self._experts)) if conductor.held_op(at, dtype) is not None]

    # What changes.

    def now(self) -> tuple[dict[str, Any], str]:
        """What was done since the last time, and the cells, as base64. Waits for a GPU that counts for itself."""
        progress = self._engine.progress()
        figures = self._figures(progress)
        before, self._last = self._last or figures, figures
        passed_s = max(figures["s"] - before["s"], 1e-9)
        since = {name: value - before[name] for name, value in figures.items()}
        places = self._places()
        self._cool(passed_s)
        hits = {name: since[name] for name in ("hits", "joined", "misses")}
        asked = sum(hits.values()) if len(self._conductor.slots) else 0
        kinds = np.bincount(places, minlength=4)
        update = {
            "time_s": round(time(), 3),
            "passed_s": round(passed_s, 3),
            "running": progress.running,
            "waiting": progress.waiting,
            "reading": list(progress.read_tokens),
            "tok_s": self._speeds(since, progress),
            "tokens": {"prompt": progress.work.read, "answer": progress.work.written},
            "lanes": self._shares(since, passed_s),
            "link_gbps": round(since["link_bytes"] / passed_s / 1e9, 3),
            "hits": hits,
            "hit_rate": round((hits["hits"] + hits["joined"]) / asked, 4) if asked else None,
            "places": dict(zip(("disk", "ram", "gpu", "arriving"), map(int, kinds), strict=True)),
            "prefix_bytes": progress.kept_bytes,
            "prefixes": progress.kept,
            "process_bytes": self._process.memory_info().rss,
        }
        return update, base64.b64encode(self._cells(places)).decode()

    def _figures(self, progress: Progress) -> dict[str, float]:
        """What only grows."""
        conductor, work = self._conductor, progress.work
        accounts, accelerator = conductor.accounts, conductor.device.accelerator
        counters = conductor.counters if accounts.are_on_device else accounts.counters
        link = None if accelerator is None else accelerator.link.counters
        return {
            "s": perf_counter(),
            "hits": counters.hits,
            "joined": counters.joined,
            "misses": counters.misses,
            "cpu_s": counters.cpu_s if accelerator is not None else work.read_s + work.written_s,
            "link_s": 0.0 if link is None else link.busy_s,
            "link_bytes": 0 if link is None else link.n_bytes,
            "read": work.read,
            "read_s": work.read_s,
            "written": work.written,
            "written_s": work.written_s,
        }

    def _speeds(self, since: dict[str, float], progress: Progress) -> dict[str, float]:
        """Tokens per second of the steps that were done; what goes on and was not done in between keeps its speed."""
        goes_on = (progress.read_tokens[1] > 0, progress.running > 0)
        for at, (name, is_on) in enumerate(zip(("read", "written"), goes_on, strict=True)):
            if since[name]:
                self._rates[at] = since[name] / max(since[f"{name}_s"], 1e-9)
            elif not is_on:
                self._rates[at] = 0.0
        return {"prompt": round(self._rates[0], 2), "answer": round(self._rates[1], 2)}

    def _shares(self, since: dict[str, float], passed_s: float) -> dict[str, float | None]:
        accelerator = self._conductor.device.accelerator
        gpu = link = None
        if accelerator is not None:
            share = accelerator.busy_share()
            gpu = None if share is None else round(share, 3)
            link = round(min(1.0, since["link_s"] / passed_s), 3)
        return {"gpu": gpu, "link": link, "cpu": round(min(1.0, since["cpu_s"] / passed_s), 3)}

    def _places(self) -> NDArray[np.uint8]:
        places = np.full(len(self._heat), DISK, np.uint8)
        for kind, experts in ((RAM, self._conductor.store.experts), *_by_arrival(self._conductor.slots.there())):
            if experts:
                layers, numbers = np.array(list(experts)).T
                places[self._firsts[layers] + numbers] = kind
        return places

    def _cool(self, passed_s: float) -> None:
        """Let heat fade, and add what was counted since."""
        counts = np.array(self._counts.tokens, np.float64)
        self._heat *= 0.5 ** (passed_s / HALF_LIFE_S)
        self._heat += counts - self._seen
        self._heat[self._heat < 1e-3] = 0.0
        self._seen = counts

    def _cells(self, places: NDArray[np.uint8]) -> bytes:
        """A byte for each expert: its place, and the logarithm of its share of its layer's choices."""
        sums = np.repeat(np.add.reduceat(self._heat, self._firsts), self._experts)
        shares = self._heat / np.maximum(sums, 1e-9)
        with np.errstate(divide="ignore"):
            levels = np.round(_LEVELS + _PER_OCTAVE * np.log2(shares))
        levels = np.where(shares > 0, np.clip(levels, 1, _LEVELS), 0)
        return (places << 6 | levels.astype(np.uint8)).tobytes()


def _parts(sizes: dict[str, int]) -> list[dict[str, Any]]:
    return [{"name": name, "bytes": int(n_bytes)} for name, n_bytes in sizes.items() if n_bytes]


def _by_arrival(there: dict[tuple[int, int], bool]) -> list[tuple[int, list[tuple[int, int]]]]:
    arrived = [expert for expert, is_there in there.items() if is_there]
    return [(GPU, arrived), (ARRIVING, [expert for expert, is_there in there.items() if not is_there])]
