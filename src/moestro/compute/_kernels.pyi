"""The compiled kernels of csrc/, as Python sees them. Tensors go in as addresses."""

from collections.abc import Sequence
from enum import Enum

class Format(Enum):
    fp32 = 0
    fp16 = 1
    bf16 = 2
    int8 = 3
    int4 = 4

class Activation(Enum):
    silu = 0
    gelu = 1
    gelu_tanh = 2
    relu2 = 3
    clamped_swiglu = 4

class Shape:
    hidden: int
    neurons: int
    has_gate: bool
    has_bias: bool
    format: Format
    activation: Activation
    alpha: float
    limit: float
    offset: float

class Linear: ...

def linear(packed: int, format: Format, rows: int, columns: int, bias: int) -> Linear: ...

class Attention:
    q: Linear
    k: Linear
    v: Linear
    head: int
    type: Format
    scaling: float
    def set_norms(
        self,
        q: int,
        q_width: int,
        q_offset: float,
        q_epsilon: float,
        k: int,
        k_width: int,
        k_offset: float,
        k_epsilon: float,
    ) -> None: ...
    def project(
        self, runner: Runner, level: str, x: int, cosine: int, sine: int, turned: int, q: int, k: int, v: int
    ) -> None: ...
    def attend(
        self, runner: Runner, level: str, query: int, keys: int, values: int, length: int, apart: int, out: int
    ) -> None: ...

class Norm:
    def __init__(self, weight: int, offset: float, epsilon: float) -> None: ...

class FirstHalf:
    attention: Attention
    output: Linear
    before: Norm
    after: Norm
    def run(
        self,
        runner: Runner,
        level: str,
        x: int,
        cosine: int,
        sine: int,
        turned: int,
        cache: tuple[int, int, int, int],
        hidden: int,
        normed: int,
    ) -> None: ...

class Router:
    def __init__(
        self, weight: int, type: Format, experts: int, hidden: int, top_k: int, normalized: bool, score_type: Format
    ) -> None: ...
    def run(self, runner: Runner, level: str, x: int, logits: int, scores: int, chosen: int) -> None: ...

class DecoderLayer:
    def __init__(self, first: FirstHalf, router: Router, shape: Shape, experts: Sequence[int]) -> None: ...

class DecoderLayers:
    def __init__(self, layers: Sequence[DecoderLayer]) -> None: ...
    def run(
        self,
        runner: Runner,
        level: str,
        x: int,
        cosine: int,
        sine: int,
        turned: int,
        caches: Sequence[tuple[int, int, int, int]],
        hidden: int,
    ) -> int: ...

class Runner:
    def __init__(self, threads: int, cpus: Sequence[int]) -> None: ...
    @property
    def threads(self) -> int: ...
    @property
    def busy_s(self) -> float: ...
    def run(
        self,
        level: str,
        shape: Shape,
        x: int,
        x_type: Format,
        tokens: int,
        works: Sequence[tuple[int, int, int, int, int, int]],
        out: int,
    ) -> None: ...
    def run_linear(
        self,
        level: str,
        linear: Linear,
        x: int,
        x_type: Format,
        tokens: int,
        out: int,
    ) -> None: ...
    def look_up(self, level: str, table: Linear, ids: int, count: int, out: int, out_type: Format) -> None: ...
    def rms_norm(
        self,
        level: str,
        x: int,
        x_type: Format,
        rows: int,
        columns: int,
        weight: int,
        offset: float,
        epsilon: float,
        out: int,
    ) -> None: ...
    def touch(self, memory: int, bytes: int) -> None: ...
    def read_seconds(self, level: str, memory: int, bytes: int, prefetch: int) -> float: ...
    def fma_flops(self, level: str, rounds: int) -> float: ...

def best_level() -> str: ...
def levels() -> list[tuple[str, bool]]: ...
