"""The compiled kernels of csrc/, as Python sees them.

Tensors must be on the CPU, contiguous where nothing else is said, and of the very size and dtype that is named; all
are checked before their memory is touched. ValueError (IndexError for a row that is not there) names what does not fit.
"""

from collections.abc import Sequence
from enum import Enum

from torch import Tensor

from .experts import ExpertWork

class Type(Enum):  # of activations
    fp32 = 0
    fp16 = 1
    bf16 = 2

class Code(Enum):
    FP32 = 0
    FP16 = 1
    BF16 = 2
    S8 = 3
    U2 = 4
    U3 = 5
    U4 = 6
    U5 = 7
    U6 = 8
    U8 = 9
    E2M1 = 10
    IQ4NL = 11
    E4M3 = 12

class Scale(Enum):
    NONE = 0
    FP16 = 1
    BF16 = 2
    FP32 = 3
    E8M0 = 4
    E4M3 = 5
    BLOCK = 6
    K4 = 7
    K2 = 8
    K6 = 9
    K3 = 10
    IQ4XS = 11
    SHIFTED = 12
    COLUMN = 13

class Zero(Enum):
    NONE = 0
    CONSTANT = 1
    FP16 = 2
    INT = 3
    ADD = 4
    MIN = 5
    FIXED = 6
    COLUMN = 7

class MatrixFormat:
    def __init__(
        self, *, code: Code, group: int, scale: Scale, zero: Zero, constant: int, super_group: int
    ) -> None: ...
    def panel_bytes(self, columns: int) -> int: ...
    @property
    def least_block(self) -> int: ...

class Activation(Enum):
    silu = 0
    gelu = 1
    gelu_tanh = 2
    relu2 = 3
    clamped_swiglu = 4

class Shape:
    def __init__(
        self,
        *,
        hidden: int,
        neurons: int,
        has_gate: bool,
        has_bias: bool,
        gate: MatrixFormat,
        up: MatrixFormat,
        down: MatrixFormat,
        block: int,
        activation: Activation,
        alpha: float,
        limit: float,
        offset: float,
        orders: int,
    ) -> None: ...

class Linear:
    def __init__(self, packed: Tensor, format: MatrixFormat, rows: int, columns: int, bias: Tensor | None) -> None: ...

class Norm:
    def __init__(self, weight: Tensor, offset: float, epsilon: float) -> None: ...

class Attention:
    def __init__(
        self,
        q: Linear,
        k: Linear,
        v: Linear,
        q_norm: Norm | None,
        k_norm: Norm | None,
        head: int,
        type: Type,
        scaling: float,
    ) -> None: ...
    def project(
        self, runner: Runner, level: str, x: Tensor, cosine: Tensor, sine: Tensor, q: Tensor, k: Tensor, v: Tensor
    ) -> None: ...
    def attend(
        self,
        runner: Runner,
        level: str,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        seen: Tensor | None,
        out: Tensor,
    ) -> None: ...

class FirstHalf:
    def __init__(self, attention: Attention, output: Linear, before: Norm, after: Norm) -> None: ...
    def run(
        self,
        runner: Runner,
        level: str,
        x: Tensor,
        cosine: Tensor,
        sine: Tensor,
        keys: Tensor,
        values: Tensor,
        seen: Tensor | None,
        hidden: Tensor,
        normed: Tensor,
    ) -> None: ...

class Router:
    def __init__(self, weight: Tensor, top_k: int, normalized: bool, score_type: Type) -> None: ...
    def run(self, runner: Runner, level: str, x: Tensor, logits: Tensor, scores: Tensor, chosen: Tensor) -> None: ...

class DecoderLayer:
    def __init__(self, first: FirstHalf, router: Router, shape: Shape, experts: tuple[Tensor, ...]) -> None: ...

class DecoderLayers:
    def __init__(self, layers: Sequence[DecoderLayer]) -> None: ...
    def run(
        self,
        runner: Runner,
        level: str,
        x: Tensor,
        cosine: Tensor,
        sine: Tensor,
        caches: Sequence[tuple[Tensor, Tensor]],
        seen: Tensor | None,
        hidden: Tensor,
    ) -> tuple[int, int]: ...

class Runner:
    def __init__(self, threads: int, cpus: Sequence[int]) -> None: ...
    @property
    def threads(self) -> int: ...
    @property
    def busy_s(self) -> float: ...
    def run(self, level: str, shape: Shape, x: Tensor, works: Sequence[ExpertWork], out: Tensor) -> None: ...
    def run_linear(self, level: str, linear: Linear, x: Tensor, out: Tensor) -> None: ...
    def look_up(self, level: str, table: Linear, ids: Tensor, out: Tensor) -> None: ...
    def rms_norm(self, level: str, x: Tensor, weight: Tensor, offset: float, epsilon: float, out: Tensor) -> None: ...
    def touch(self, memory: Tensor) -> None: ...
    def read_seconds(self, level: str, memory: Tensor, prefetch: int) -> float: ...
    def fma_flops(self, level: str, rounds: int) -> float: ...
    def dot_flops(self, level: str, rounds: int) -> float: ...

class Layout(Enum):
    plain = 0
    nibbles = 1
    awq = 2
    gptq = 3
    gguf = 4
    strided = 5

class Stored:
    def __init__(
        self,
        *,
        format: MatrixFormat,
        layout: Layout,
        rows: int,
        columns: int,
        codes: Tensor,
        row_stride: int = 0,
        column_stride: int = 0,
        scales: Tensor | None = None,
        zeros: Tensor | None = None,
        flip: int = 0,
        tensor_scale: float = 1.0,
        row_order: Tensor | None = None,
        column_order: Tensor | None = None,
    ) -> None: ...

def repack(runner: Runner, jobs: Sequence[tuple[Stored, int, int, int, int, Tensor]]) -> None: ...
def solve(
    runner: Runner,
    level: str,
    weights: Tensor,
    rows: int,
    columns: int,
    bits: int,
    group: int,
    iterate: bool,
    round_zero: bool,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
) -> None: ...
def write_fitted(
    runner: Runner,
    format: MatrixFormat,
    weights: Tensor,
    rows: int,
    columns: int,
    scales: Tensor,
    zeros: Tensor,
    out: Tensor,
) -> None: ...
def write_signed_bytes(
    runner: Runner, format: MatrixFormat, weights: Tensor, rows: int, columns: int, out: Tensor
) -> None: ...
def crc32c(data: Tensor, crc: int = 0, by_tables: bool = False) -> int: ...
def crc32c_combine(first: int, second: int, second_bytes: int) -> int: ...
def best_level() -> str: ...
def levels() -> list[tuple[str, bool]]: ...
