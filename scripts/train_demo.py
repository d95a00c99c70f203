"""Trains a small Mixtral on a story corpus, as the demo model of this package was trained.

Makes the byte-level BPE tokenizer, trains (checkpoints, Ctrl-C and exact resume), writes the Hugging Face
format in bf16 and prints the held-out perplexity and how unevenly the experts are used. Knows nothing of
`moestro`: it needs torch, transformers, tokenizers, typer and rich only.

    python scripts/train_demo.py --out build/stories --tokens 12_500_000   # about 90 minutes on 2 cores
    python scripts/train_demo.py --evaluate src/moestro/demo               # the figures of a checkpoint

Shapes: B windows, C context, T = B * C tokens, E experts, K experts a token, V vocabulary.
"""

import hashlib
import math
import os
import pickle
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

UNKNOWN, BOOK, PAD = "<unk>", "<|book|>", "<|pad|>"  # ids 0, 1, 2; BOOK opens each book: it is bos and eos
CHECKPOINT = "checkpoint.pt"
CHECKPOINT_EVERY_S = 180.0
BALANCE_WEIGHT = 0.01  # of each layer's balance loss, as in Switch Transformer
FIRST_TOKENS = 5_888  # 23 windows of 256
RANDOM_WINDOWS = 64
FAMILY: dict[str, Any] = {
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
}
SHAPE = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_local_experts"]
SHAPE += ["num_attention_heads", "num_key_value_heads"]
SIZES = {"demo": (4096, 192, 384, 6, 8, 6, 2), "tiny": (320, 32, 32, 2, 4, 2, 1)}
Size = StrEnum("Size", list(SIZES))
Device = StrEnum("Device", ["auto", "cpu", "cuda"])

console = Console()
transformers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()


class UserError(Exception):
    """Something the caller can put right: printed as one line, exit status 2."""


@dataclass(frozen=True)
class Settings:
    """What decides the weights; a checkpoint resumes only under the settings that it was begun with."""

    corpus: str  # SHA-256 of the text
    tokens: int
    batch_tokens: int
    context: int
    lr: float
    seed: int
    size: str

    @property
    def steps(self) -> int:
        return math.ceil(self.tokens / self.batch_tokens)


def random_windows(tokens: Tensor, count: int, context: int, seed: int) -> Tensor:
    """[count, C + 1]: each window predicts C tokens; the last one is a target only."""
    draw = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(tokens) - context, (count, 1), generator=draw)
    return tokens[starts + torch.arange(context + 1)]


class RouterTap:
    """Keeps what each layer's router gave in the last forward pass: logits [T, E], chosen experts [T, K]."""

    def __init__(self, model: MixtralForCausalLM) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        for index, layer in enumerate(model.model.layers):
            layer.mlp.gate.register_forward_hook(partial(self._keep, index))

    def _keep(self, layer: int, _router: nn.Module, _inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        self.layers[layer] = (output[0], output[2])

    def counts(self) -> Tensor:
        """How often each layer chose each expert, [layers, E]."""
        layers = self.layers.values()
        return torch.stack([torch.bincount(chosen.flatten(), minlength=x.shape[-1]) for x, chosen in layers])

    def balance_loss(self) -> Tensor:
        """The sum over layers of E * sum_e share_e * probability_e, which is 1 in a layer in balance."""
        # Not the library's own (output_router_logits=True): that one averages shares and probabilities over
        # all layers first. It is content when layers favour different experts, however few each one uses,
        # and with it 2-4 of 8 experts in each layer came to do most of the work.
        shares = self.counts().float() / self.layers[0][1].numel()
        probabilities = torch.stack([logits.float().softmax(-1).mean(0) for logits, _ in self.layers.values()])
        return shares.shape[-1] * (shares * probabilities).sum()


@dataclass
class Training:
    """A model in training; step counts the optimizer steps done."""

    settings: Settings
    tokenizer: Tokenizer
    model: MixtralForCausalLM
    optimizer: torch.optim.AdamW
    tap: RouterTap
    step: int = 0
    losses: list[float] = field(default_factory=list)

    def advance(self, batch: Tensor) -> None:
        """One optimizer step on `batch` [B, C + 1]."""
        device = self.model.device
        batch = batch.to(device)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.settings.steps, self.settings.lr)
        # On the CPU autocast costs more in casts than it saves: 2,190 against 3,250 tok/s on 2 cores.
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = self.model(batch[:, :-1], use_cache=False).logits  # [B, C, V]
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        (loss + BALANCE_WEIGHT * self.tap.balance_loss()).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(loss.item())
        self.step += 1

    def save(self, out: Path) -> None:
        """Writes the checkpoint whole or not at all."""
        state = {
            "settings": asdict(self.settings),
            "tokenizer": self.tokenizer.to_str(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all(),
        }
        temporary = out / f"{CHECKPOINT}.tmp"
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, out / CHECKPOINT)

    def restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        torch.set_rng_state(state["rng"])
        if len(state["cuda_rng"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["cuda_rng"])


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first 5 % (200 steps at most), then a cosine down to 5 % of the peak."""
    warmup = max(1, min(200, steps // 20))
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


def train_tokenizer(text: str, vocabulary: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[UNKNOWN, BOOK, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, text: str) -> Tensor:
    # By line: a single encoding of the whole corpus takes gigabytes for its offsets.
    encodings = tokenizer.encode_batch_fast(text.splitlines(keepends=True))
    return torch.tensor([number for encoding in encodings for number in encoding.ids])


def read_text(path: Path, what: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"cannot read the {what} {path}: {reason}") from None


def choose_device(device: Device) -> torch.device:
    if device == Device.cuda and not torch.cuda.is_available():
        raise UserError("--device cuda: this PyTorch sees no CUDA GPU")
    wanted = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(wanted if device == Device.auto else device.value)


def read_checkpoint(out: Path, settings: Settings) -> dict[str, Any] | None:
    """The checkpoint in `out` if there is one; refuses one of other settings and a directory of other things."""
    path = out / CHECKPOINT
    if not path.exists():
        if out.exists() and any(not entry.name.startswith(CHECKPOINT) for entry in out.iterdir()):
            raise UserError(f"{out} has files but no {CHECKPOINT}; choose an empty or new directory for --out")
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        begun = state["settings"]
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError):
        raise UserError(f"{path} is not a checkpoint of this script; --no-resume starts over") from None
    for name, value in asdict(settings).items():
        if begun.get(name) != value:
            option = f"--{name.replace('_', '-')}"
            other = "another text" if name == "corpus" else f"{option} {begun.get(name)}"
            raise UserError(f"{out} was begun with {other}; use the same {option}, another --out or --no-resume")
    return state


def begin(settings: Settings, text: str, state: dict[str, Any] | None, device: torch.device) -> Training:
    """A new training, or the one of `state` where it stood."""
    torch.manual_seed(settings.seed)
    shape = dict(zip(SHAPE, SIZES[settings.size], strict=True))
    tokenizer = Tokenizer.from_str(state["tokenizer"]) if state else train_tokenizer(text, shape["vocab_size"])
    model = MixtralForCausalLM(MixtralConfig(**FAMILY, **shape)).to(device).train()
    # The plain loop over experts: 3,250 tok/s where grouped_mm gives 460 on 2 cores, and autocast reaches it.
    model.set_experts_implementation("eager")
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.95), fused=True)
    training = Training(settings, tokenizer, model, optimizer, RouterTap(model))
    if state:
        training.restore(state)
    return training


@contextmanager
def stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Turns Ctrl-C into a flag, so that the step ends before the checkpoint; a second Ctrl-C kills."""
    received: list[int] = []
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(received)
    finally:
        signal.signal(signal.SIGINT, before)


def run_steps(training: Training, tokens: Tensor, out: Path, minutes: float) -> bool:
    """Trains to the last step or the time limit and saves; False if Ctrl-C cut it short."""
    settings = training.settings
    count = settings.batch_tokens // settings.context
    begun = saved = time.monotonic()
    first = training.step
    columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as progress, stop_on_interrupt() as stopped:
        bar = progress.add_task("starting", total=settings.steps, completed=first)
        while training.step < settings.steps and not stopped() and time.monotonic() - begun < minutes * 60:
            # Drawn from seed and step alone: the step is the whole data position.
            seed = settings.seed * 1_000_003 + training.step
            training.advance(random_windows(tokens, count, settings.context, seed))
            now = time.monotonic()
            loss = sum(training.losses[-20:]) / len(training.losses[-20:])
            speed = (training.step - first) * settings.batch_tokens / (now - begun)
            done = f"{training.step * settings.batch_tokens / 1e6:.2f} of {settings.tokens / 1e6:.2f} M tokens"
            state = f"{done}, loss {loss:.3f}, {speed:,.0f} tok/s"
            progress.update(bar, completed=training.step, description=state)
            if now - saved >= CHECKPOINT_EVERY_S:
                training.save(out)
                progress.print(f"{state}, saved")
                saved = time.monotonic()
        training.save(out)
        return not stopped()


def export(training: Training, out: Path) -> None:
    """Writes the Hugging Face format, each file whole or not at all; leaves the model in bf16."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=training.tokenizer,
        bos_token=BOOK,
        eos_token=BOOK,
        pad_token=PAD,
        unk_token=UNKNOWN,
        model_max_length=FAMILY["max_position_embeddings"],
    )
    with tempfile.TemporaryDirectory(dir=out, prefix=f"{CHECKPOINT}.export-") as folder:
        training.model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for file in Path(folder).iterdir():
            os.replace(file, out / file.name)


@torch.no_grad()
def perplexity(model: MixtralForCausalLM, windows: Tensor, tap: RouterTap) -> tuple[float, Tensor]:
    """Of all but the first token of each window [windows, tokens]; and the layers' expert counts [layers, E]."""
    total, counts = 0.0, []
    for batch in windows.to(model.device).split(16):
        logits = model(batch, use_cache=False).logits[:, :-1]
        total += F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
        counts.append(tap.counts().cpu())
    return math.exp(total / windows[:, 1:].numel()), torch.stack(counts).sum(0)


def evaluate(folder: Path, heldout: Path, context: int, device: torch.device) -> list[str]:
    """The figures of a checkpoint in the Hugging Face format, a line each."""
    text = read_text(heldout, "held-out text")
    try:
        model = MixtralForCausalLM.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32, experts_implementation="eager"
        )
        tokens = encode(Tokenizer.from_file(str(folder / "tokenizer.json")), text)
    except Exception as error:  # Tokenizer.from_file raises a bare Exception
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{folder} is not a Mixtral checkpoint in the Hugging Face format: {reason}") from None
    check_length(tokens, context, heldout)
    model = model.to(device).eval()
    tap = RouterTap(model)
    at_random, _ = perplexity(model, random_windows(tokens, RANDOM_WINDOWS, context, seed=0), tap)
    cut = tokens[: len(tokens) // context * context].view(-1, context)
    first, counts = perplexity(model, cut[: max(1, FIRST_TOKENS // context)], tap)
    everywhere, _ = perplexity(model, cut, tap)
    use = counts / counts.float().mean(1, keepdim=True)
    hottest, coldest = use.amax(1), use.amin(1)
    return [
        f"held-out perplexity at context {context}:",
        f"  {at_random:8.1f}  {RANDOM_WINDOWS} random windows (seed 0)",
        f"  {first:8.1f}  first {min(FIRST_TOKENS // context * context, cut.numel()):,} tokens",
        f"  {everywhere:8.1f}  all {cut.numel():,} tokens",
        "use of the experts over those first tokens, 1 = the mean of a layer:",
        f"  {hottest.mean():8.2f}  hottest expert, mean of the layers (worst layer {hottest.max():.2f})",
        f"  {coldest.mean():8.2f}  coldest expert, mean of the layers (worst layer {coldest.min():.2f})",
    ]


def check_length(tokens: Tensor, context: int, path: Path) -> None:
    if len(tokens) <= context:
        raise UserError(f"{path} has {len(tokens):,} tokens; --context {context} needs more than that")


def train(settings: Settings, text: str, heldout: Path, out: Path, minutes: float, on: torch.device) -> bool:
    """Trains into `out`, from its checkpoint if it has one; False if Ctrl-C cut it short."""
    heldout_text = read_text(heldout, "held-out text")
    state = read_checkpoint(out, settings)
    out.mkdir(parents=True, exist_ok=True)
    with console.status("tokenizing the corpus"):
        training = begin(settings, text, state, on)
        tokens = encode(training.tokenizer, text)
        check_length(tokens, settings.context, "the corpus")
        check_length(encode(training.tokenizer, heldout_text), settings.context, str(heldout))
    parameters = sum(parameter.numel() for parameter in training.model.parameters())
    console.print(
        f"{parameters / 1e6:.1f} M parameters on {on.type}, {len(tokens) / 1e6:.2f} M tokens of text, "
        f"step {training.step:,} of {settings.steps:,}"
    )
    if not run_steps(training, tokens, out, minutes):
        return False
    export(training, out)
    return True


def main(
    out: Annotated[Path | None, Option(help="Directory for model and checkpoint.", show_default="required")] = None,
    corpus: Annotated[Path, Option(help="Text to train on.")] = Path("data/stories/train.txt"),
    heldout: Annotated[Path, Option(help="Text to evaluate on.")] = Path("data/stories/heldout.txt"),
    tokens: Annotated[int, Option(min=1, help="Tokens to train on; the learning rate falls until then.")] = 12_500_000,
    batch_tokens: Annotated[int, Option(min=1, help="Tokens of one step, a multiple of the context.")] = 4096,
    context: Annotated[int, Option(min=2, max=512, help="Tokens of one window.")] = 256,
    lr: Annotated[float, Option(min=0.0, help="Peak learning rate.")] = 2e-3,
    minutes: Annotated[float | None, Option(min=0.0, help="Stop after this long; the same command goes on.")] = None,
    device: Annotated[Device, Option(help="auto: the GPU if there is one.")] = Device.auto,
    seed: Annotated[int, Option(min=0, help="Of weights and windows.")] = 0,
    resume: Annotated[bool, Option(help="Go on from the checkpoint in --out, or start over.")] = True,
    size: Annotated[Size, Option(help="demo: 12 M parameters; tiny: for tests.")] = Size.demo,
    evaluate: Annotated[Path | None, Option(help="Only print the figures of the checkpoint in this directory.")] = None,
) -> None:
    """Train a small Mixtral on a text, or print the held-out figures of one."""
    try:
        on = choose_device(device)
        if evaluate is None:
            if out is None:
                raise UserError("--out DIR is needed to train (or --evaluate DIR)")
            if batch_tokens % context:
                raise UserError(f"--batch-tokens {batch_tokens} is no multiple of --context {context}")
            text = read_text(corpus, "corpus")
            digest = hashlib.sha256(text.encode()).hexdigest()
            settings = Settings(digest, tokens, batch_tokens, context, lr, seed, size.value)
            if not resume:
                (out / CHECKPOINT).unlink(missing_ok=True)
        ...
