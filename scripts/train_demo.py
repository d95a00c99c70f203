"""Trains a small Mixtral on a story corpus, as the demo model of this package was trained.

Makes the byte-level BPE tokenizer, trains (checkpoints, Ctrl-C, exact resume), writes the Hugging Face
format in bf16 and prints the held-out perplexity and how unevenly the experts are used. Knows nothing of
`moestro`: torch, transformers, tokenizers, typer and rich are all it needs.

    python scripts/train_demo.py --out build/stories           # an hour or two on 2 cores; Ctrl-C is safe
    python scripts/train_demo.py --evaluate src/moestro/demo   # the figures of an existing checkpoint

A resumed run ends in the same bits as an uninterrupted one on the CPU; a GPU adds in no fixed order.
Shapes: B windows, C context, T = B * C tokens, E experts, K experts a token, V vocabulary.
"""

import hashlib
import lzma
import math
import os
import pickle
import signal
import tempfile
import time
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import AutoConfig, MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging
from typer import Option

UNKNOWN, BOOK, PAD = "<unk>", "<|book|>", "<|pad|>"  # ids 0, 1, 2; BOOK opens each book: it is bos and eos
CHECKPOINT = "checkpoint.pt"
CHECKPOINT_EVERY_S = 180.0
BALANCE_WEIGHT = 0.01  # of each layer's balance loss, as in Switch Transformer
FIRST_TOKENS = 5_888  # 23 windows of 256
RANDOM_WINDOWS = 64
MAX_CONTEXT = 512
SHAPE = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_local_experts"]
SHAPE += ["num_attention_heads", "num_key_value_heads"]
SIZES = {"demo": (4096, 192, 384, 6, 8, 6, 2), "tiny": (320, 32, 32, 2, 4, 2, 1)}

Size = StrEnum("Size", ["demo", "tiny"])
Device = StrEnum("Device", ["auto", "cpu", "cuda"])
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console()
transformers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()


class UserError(Exception):
    """An error that the user can correct. It is printed as one line, and the exit status is 2."""


@dataclass(frozen=True)
class Settings:
    """What the weights depend on; training resumes from a checkpoint only with the settings that it was begun with."""

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


class RouterTap:
    """Keeps the output of each layer's router in the last pass: logits [T, E] and chosen experts [T, K]."""

    def __init__(self, model: MixtralForCausalLM) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        for index, layer in enumerate(model.model.layers):
            layer.mlp.gate.register_forward_hook(partial(self._keep, index))

    def _keep(self, layer: int, _router: nn.Module, _inputs: Any, output: tuple[Tensor, ...]) -> None:
        self.layers[layer] = (output[0], output[2])

    def counts(self) -> Tensor:
        """How often each layer's router chose each expert: [layers, E]."""
        layers = self.layers.values()
        return torch.stack([torch.bincount(chosen.flatten(), minlength=x.shape[-1]) for x, chosen in layers])

    def balance_loss(self) -> Tensor:
        """The sum over layers of E * sum_e share_e * probability_e; a balanced layer adds 1."""
        # Transformers' own loss (output_router_logits=True) averages shares and probabilities over all layers first,
        # so it is low when layers favour different experts, however few each layer uses. With it, 2-4 of the 8 experts
        # of each layer did most of the work in the end.
        shares = self.counts().float() / self.layers[0][1].numel()  # [layers, E]
        probabilities = torch.stack([x.float().softmax(-1).mean(0) for x, _ in self.layers.values()])
        return shares.shape[-1] * (shares * probabilities).sum()


@dataclass
class Training:
    """A model in training; `step` counts the optimizer steps done."""

    settings: Settings
    tokenizer: Tokenizer
    model: MixtralForCausalLM
    optimizer: torch.optim.AdamW
    tap: RouterTap
    step: int = 0
    losses: list[float] = field(default_factory=list)  # since this process began

    def advance(self, batch: Tensor) -> None:
        """One optimizer step on `batch` [B, C + 1]."""
        batch = batch.to(self.model.device)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.settings.steps, self.settings.lr)
        # On the CPU autocast's casts cost more than it saves: 2,190 against 3,250 tok/s on 2 cores.
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=batch.is_cuda):
            logits = self.model(batch[:, :-1], use_cache=False).logits  # [B, C, V]
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        (loss + BALANCE_WEIGHT * self.tap.balance_loss()).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(loss.item())
        self.step += 1

    def save(self, out: Path) -> None:
        """Write the checkpoint whole or not at all."""
        state = {
            "settings": asdict(self.settings),
            "tokenizer": self.tokenizer.to_str(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,  # the data position too: the windows of a step follow from seed and step
            "rng": torch.get_rng_state(),
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


def learning_rate(step: int, steps: int, peak: float) -> float:
    """The learning rate: linear warm-up over 5 % of the steps (200 at most), then a cosine to 5 % of the peak."""
    warmup = max(1, min(200, steps // 20))
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


def random_windows(tokens: Tensor, count: int, context: int, seed: int) -> Tensor:
    """[count, C + 1]: each window predicts C tokens, the last of them a target only."""
    draw = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(tokens) - context, (count, 1), generator=draw)
    return tokens[starts + torch.arange(context + 1)]


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


def encode(tokenizer: Tokenizer, text: str, context: int, what: str) -> Tensor:
    # By line: one encoding of the whole corpus would take gigabytes for its offsets.
    encodings = tokenizer.encode_batch_fast(text.splitlines(keepends=True))
    tokens = torch.tensor([number for encoding in encodings for number in encoding.ids])
    if len(tokens) <= context:
        raise UserError(f"{what} has {len(tokens):,} tokens; --context {context} needs more than that")
    return tokens


def read_text(path: Path) -> str:
    """A text, which may be compressed by xz."""
    opened = lzma.open if path.suffix == ".xz" else open
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            return str(file.read())
    except (OSError, UnicodeDecodeError, lzma.LZMAError, EOFError) as error:
        broken = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else "no xz file, or cut short"
        reason = error.strerror if isinstance(error, OSError) else broken
        raise UserError(f"cannot read {path}: {reason}") from None


def read_checkpoint(out: Path, settings: Settings, resume: bool) -> dict[str, Any] | None:
    """The checkpoint to resume from; None if there is none. Refuses other settings, and a folder of other files."""
    path = out / CHECKPOINT
    if not path.exists() and out.is_dir() and any(not x.name.startswith(CHECKPOINT) for x in out.iterdir()):
        raise UserError(f"{out} has files but no {CHECKPOINT}; choose an empty or new directory for --out")
    if not path.exists() or not resume:
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
            raise UserError(f"{out} was begun with {other}: use the same, another --out, or --no-resume")
    return state


def begin(settings: Settings, text: str, state: dict[str, Any] | None, device: torch.device) -> Training:
    """A new training, or the one that `state` was saved from."""
    torch.manual_seed(settings.seed)
    shape = dict(zip(SHAPE, SIZES[settings.size], strict=True))
    saved = state["tokenizer"] if state else None
    tokenizer = Tokenizer.from_str(saved) if saved else train_tokenizer(text, shape["vocab_size"])
    rope = {"rope_type": "default", "rope_theta": 10_000.0}
    tokens = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 2, "tie_word_embeddings": True}
    config = MixtralConfig(**shape, **tokens, max_position_embeddings=MAX_CONTEXT, rope_parameters=rope)
    model = MixtralForCausalLM(config).to(device).train()
    # The plain loop over experts: 3,250 tok/s where grouped_mm gives 460 on 2 cores, and autocast reaches it.
    model.set_experts_implementation("eager")
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    norms = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.95), fused=True)
    training = Training(settings, tokenizer, model, optimizer, RouterTap(model))
    if state:
        training.restore(state)
    return training


def run_steps(training: Training, tokens: Tensor, out: Path, minutes: float) -> bool:
    """Train to the last step or the time limit, and save; return False if Ctrl-C ended it early."""
    settings, first = training.settings, training.step
    count = settings.batch_tokens // settings.context
    stopped: list[int] = []  # Ctrl-C is only noted, so that the step is finished and saved
    before = signal.signal(signal.SIGINT, lambda number, _frame: stopped.append(number))
    begun = saved = now = time.monotonic()
    columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
    try:
        with Progress(*columns, console=console) as progress:
            bar = progress.add_task("training", total=settings.steps, completed=first)
            while training.step < settings.steps and not stopped and now - begun < minutes * 60:
                seed = settings.seed * 1_000_003 + training.step
                training.advance(random_windows(tokens, count, settings.context, seed))
                now = time.monotonic()
                loss = sum(training.losses[-20:]) / len(training.losses[-20:])
                speed = (training.step - first) * settings.batch_tokens / (now - begun)
                done = training.step * settings.batch_tokens / 1e6
                state = f"{done:.2f} M tokens, loss {loss:.3f}, {speed:,.0f} tok/s"
                progress.update(bar, completed=training.step, description=state)
                if now - saved >= CHECKPOINT_EVERY_S:
                    training.save(out)
                    progress.print(f"saved at {state}")
                    saved = now
            training.save(out)
    finally:
        signal.signal(signal.SIGINT, before)
    return not stopped


def export(training: Training, out: Path) -> None:
    """Write the Hugging Face format, each file whole or not at all. Turns the model to bf16."""
    special = {"bos_token": BOOK, "eos_token": BOOK, "pad_token": PAD, "unk_token": UNKNOWN}
    bare = training.tokenizer
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, model_max_length=MAX_CONTEXT, **special)
    with tempfile.TemporaryDirectory(dir=out, prefix=f"{CHECKPOINT}.export-") as folder:
        training.model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for file in Path(folder).iterdir():
            os.replace(file, out / file.name)


@torch.no_grad()
def perplexity(model: MixtralForCausalLM, windows: Tensor, tap: RouterTap) -> tuple[float, Tensor]:
    """Of all but the first token of each of the windows [B, C], and the experts' counts [layers, E]."""
    total, counts = 0.0, []
    for batch in windows.to(model.device).split(16):
        logits = model(batch, use_cache=False).logits[:, :-1]  # [B, C - 1, V]
        total += F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
        counts.append(tap.counts())
    return math.exp(total / windows[:, 1:].numel()), torch.stack(counts).sum(0)


def figures(folder: Path, heldout: str, context: int, device: torch.device) -> list[str]:
    """The held-out figures of a checkpoint in the Hugging Face format, a line each."""
    if not (folder / "config.json").is_file() or not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder} has no config.json and tokenizer.json: not a Hugging Face checkpoint")
    if AutoConfig.from_pretrained(folder).model_type != "mixtral":
        raise UserError(f"{folder} is not a Mixtral")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokens = encode(tokenizer, heldout, context, "the held-out text")
    model = MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
    tap = RouterTap(model.to(device).eval())
    cut = tokens[: len(tokens) // context * context].view(-1, context)
    start = cut[: max(1, FIRST_TOKENS // context)]
    at_random, _ = perplexity(model, random_windows(tokens, RANDOM_WINDOWS, context, seed=0), tap)
    first, counts = perplexity(model, start, tap)
    everywhere, _ = perplexity(model, cut, tap)
    use = counts / counts.float().mean(1, keepdim=True)
    hottest, coldest = use.amax(1), use.amin(1)
    return [
        f"{folder}: held-out perplexity at context {context}",
        f"{at_random:8.1f}  {RANDOM_WINDOWS} random windows, seed 0",
        f"{first:8.1f}  first {start.numel():,} tokens",
        f"{everywhere:8.1f}  all {cut.numel():,} tokens",
        "use of the experts over those first tokens, 1 = the mean of the layer",
        f"{hottest.mean():8.2f}  hottest expert, mean of the layers; worst layer {hottest.max():.2f}",
        f"{coldest.mean():8.3f}  coldest expert, mean of the layers; worst layer {coldest.min():.3f}",
    ]


def train(
    settings: Settings, text: str, heldout: str, out: Path, *, minutes: float, resume: bool, on: torch.device
) -> None:
    """Train into `out` and write the model there; exit with status 130 after Ctrl-C."""
    state = read_checkpoint(out, settings, resume)
    out.mkdir(parents=True, exist_ok=True)
    with console.status("reading the corpus"):
        training = begin(settings, text, state, on)
        tokens = encode(training.tokenizer, text, settings.context, "the corpus")
        encode(training.tokenizer, heldout, settings.context, "the held-out text")
    model = f"{training.model.num_parameters() / 1e6:.1f} M parameters on {on.type}"
    console.print(f"{model}, text of {len(tokens):,} tokens, step {training.step:,} of {settings.steps:,}")
    finished = run_steps(training, tokens, out, minutes)
    if training.step < settings.steps:
        console.print(f"stopped and saved at step {training.step:,}; the same command goes on from there")
    if not finished:
        raise typer.Exit(130)
    export(training, out)


@app.command()
def main(
    out: Annotated[Path | None, Option(help="Directory for model and checkpoint; needed to train.")] = None,
    corpus: Annotated[Path, Option(help="Text to train on.")] = Path("data/stories/train.txt.xz"),
    heldout: Annotated[Path, Option(help="Text to evaluate on.")] = Path("data/stories/heldout.txt"),
    tokens: Annotated[int, Option(min=1, help="To train on; the schedule's length.")] = 12_500_000,
    batch_tokens: Annotated[int, Option(min=1, help="Tokens a step, a multiple of --context.")] = 4096,
    context: Annotated[int, Option(min=2, max=MAX_CONTEXT, help="Tokens a window.")] = 256,
    lr: Annotated[float, Option(min=0, help="Peak learning rate.")] = 2e-3,
    minutes: Annotated[float, Option(min=0, help="Save and stop this run after so long.")] = math.inf,
    device: Annotated[Device, Option(help="auto: a GPU if PyTorch sees one.")] = Device.auto,
    seed: Annotated[int, Option(min=0, max=2**32, help="Of the weights and the windows.")] = 0,
    resume: Annotated[bool, Option(help="Go on from the checkpoint in --out, or start over.")] = True,
    size: Annotated[Size, Option(help="demo: 12 M parameters. tiny: for tests.")] = Size.demo,
    evaluate: Annotated[Path | None, Option(help="Only print the figures of this checkpoint.")] = None,
) -> None:
    """Train a small Mixtral on a text, or print the held-out figures of one."""
    try:
        if device == Device.cuda and not torch.cuda.is_available():
            raise UserError("--device cuda: this PyTorch sees no CUDA GPU")
        on = torch.device("cpu" if device == Device.cpu or not torch.cuda.is_available() else "cuda")
        folder = evaluate or out
        if folder is None:
            raise UserError("give --out DIR to train, or --evaluate DIR")
        heldout_text = read_text(heldout)
        if evaluate is None:
            if batch_tokens % context:
                raise UserError(f"--batch-tokens {batch_tokens} is no multiple of --context {context}")
            text = read_text(corpus)
            digest = hashlib.sha256(text.encode()).hexdigest()
            settings = Settings(digest, tokens, batch_tokens, context, lr, seed, size.value)
            train(settings, text, heldout_text, folder, minutes=minutes, resume=resume, on=on)
        for line in figures(folder, heldout_text, context, on):
            typer.echo(line)
    except (UserError, OSError, SafetensorError) as error:
        typer.echo(f"train_demo: {str(error).splitlines()[0]}", err=True)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    app()
