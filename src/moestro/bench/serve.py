"""Time a server's engine under clients that ask in a closed loop, and the turns of conversations.

    moestro bench serve --shape olmoe-1b-7b --bits 4

In each round all loads take their turn: 1, 4 and 16 clients whose answers run together, and the most clients once more
with one answer at a time. A figure is the median of the rounds. A turn of a conversation is measured beside a prompt of
as many new tokens that nothing is known of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ..compute.cpu import best_level, core_cpus
from ..console import print_lines, print_table
from ..loading.config import MoestroConfig
from ..loading.load import load, load_tokenizer
from ..loading.random_model import build_random_model
from ..machine.probe import cpu_model
from ..planning.options import ModelOptions, Options
from ..serve.engine import Engine
from ..serve.requests import Request, Sampling
from ..serve.sampling import ends_of
from ..serve.service import Loaded
from .report import Report
from .serve_clients import asking
from .serve_load import Answered, LoadFigures, Prompts, ask_engine, figures_of, medians_of, random_prompts
from .serve_turns import TurnFigures, take_turns, turns_context

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CLIENTS = (1, 4, 16)
PROMPT_TOKENS, ANSWER_TOKENS = 128, 64
LEAST_REQUESTS = 4  # of a load in a round, so that one client asks more than once
Ask = Callable[[Prompts], list[Answered]]


@dataclass(frozen=True, slots=True)
class ServeReport(Report):
    """One run. through: "engine", or "http" where clients of another process asked over loopback."""

    model: str
    layers: int
    threads: int
    level: str
    through: str
    batching: str
    prompt_tokens: int
    answer_tokens: int
    loads: tuple[LoadFigures, ...]
    turns: tuple[TurnFigures, ...]

    def print(self) -> None:
        """Print a table of the loads, and one of the turns."""
        way = "asked over HTTP on loopback" if self.through == "http" else "asked without HTTP"
        print_lines(
            f"{cpu_model()}, {self.level}, {self.threads} threads; {self.model}, {self.layers} layers, {way}",
            f"prompts of {self.prompt_tokens} and answers of {self.answer_tokens} tokens; {self.batching}",
        )
        print_table(_LOAD_COLUMNS, [_cells(one) for one in self.loads])
        if self.turns:
            print_table(_TURN_COLUMNS, [_turn_cells(one) for one in self.turns])


_LOAD_COLUMNS = (
    *("clients", "at a time", "tok/s in all", "answers", "while decoding"),
    *("first token p50, p99 ms", "between p50, p99 ms", "cached"),
)
_TURN_COLUMNS = ("agents", "turn", "prompt", "cached", "new", "first token ms", "new alone ms", "ratio")


def _turn_cells(one: TurnFigures) -> tuple[str, ...]:
    sizes = (one.agents, one.turn, one.prompt_tokens, one.cached_tokens, one.new_tokens)
    return (*map(str, sizes), f"{one.first_s * 1e3:.0f}", f"{one.cold_s * 1e3:.0f}", f"{one.ratio:.2f}")


def _cells(one: LoadFigures) -> tuple[str, ...]:
    ratio = "" if one.ratio is None else f" ({one.ratio:.2f})"
    decoding = "-" if one.decoding_tok_s is None else f"{one.decoding_tok_s:.1f}"
    of_one = "" if one.decoding_ratio is None else f" ({one.decoding_ratio:.2f})"
    first, between = (", ".join(f"{value * 1e3:.0f}" for value in pair) for pair in (one.first_s, one.between_s))
    speeds = f"{one.total_tok_s:.1f}{ratio}", f"{one.answer_tok_s:.1f}", f"{decoding}{of_one}"
    return str(one.clients), str(one.at_a_time), *speeds, first, between, str(one.cached_tokens)


def load_served(
    model: str | None, source: ModelOptions, options: Options, layers: int | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A checkpoint, or a random model of a shape with so many layers, and its tokenizer.

    Raises:
        As `load`.
    """
    trusted = source.trust_remote_code
    tokenizer = load_tokenizer(
        model, shape=source.shape, revision=source.revision, tokenizer=source.tokenizer, trust_remote_code=trusted
    )
    if source.shape is None or layers is None:
        return load(model, **source.to_dict(), **options.to_dict()), tokenizer
    config = MoestroConfig(**options.to_dict())
    return build_random_model(source.shape, config, dtype=torch.bfloat16, seed=0, layers=layers), tokenizer


def measure_serve(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    *,
    clients: Sequence[int] = CLIENTS,
    prompt_tokens: int = PROMPT_TOKENS,
    answer_tokens: int = ANSWER_TOKENS,
    requests: int = 2,
    rounds: int = 3,
    turns: bool = False,
    http: bool = False,
    threads: int | None = None,
) -> ServeReport:
    """Measure a model that is loaded.

    Args:
        name: of the model, for the report.
        clients: how many ask at a time, for each load. requests: of each client in a round.
        turns: also those of conversations. http: through a server on loopback, with clients in another process.

    Raises:
        RequestError: a number that is not possible, or an answer failed. BudgetError: too little RAM.
    """
    make = partial(request_of, model)
    context = max(prompt_tokens + answer_tokens, turns_context() if turns else 0)
    most = max(clients)
    with ExitStack() as stack:

        def start(at_a_time: int) -> tuple[Engine, Ask]:
            engine = Engine(model, tokenizer, max_requests=at_a_time, context=context, queue=most)
            stack.callback(engine.close, finish=False)
            if http:
                return engine, stack.enter_context(asking(Loaded(model, tokenizer, engine), answer_tokens))
            return engine, lambda prompts: ask_engine(engine, prompts, lambda one: make(one, answer_tokens))

        together, alone = start(most), start(1)
        loads = [(count, *together) for count in clients] + ([(most, *alone)] if most > 1 else [])
        sizes = {"tokens": prompt_tokens, "vocabulary": vocabulary_of(model)}
        found: list[list[LoadFigures]] = [[] for _ in loads]
        for seed in range(rounds + 1):
            for (count, engine, ask), figures in zip(loads, found, strict=True):
                each = 1 if seed == 0 else max(requests, -(-LEAST_REQUESTS // count))  # the first round warms up
                prompts = random_prompts(clients=count, requests=each, seed=seed * 1000 + count, **sizes)
                seen = figures_of(ask(prompts), count, engine.max_requests)
                figures += [] if seed == 0 else [seen]
        turned = take_turns(together[0], vocabulary_of(model), make, rounds) if turns else ()
    return ServeReport(
        name,
        model.config.get_text_config(decoder=True).num_hidden_layers,
        threads or len(core_cpus()),
        best_level(),
        "http" if http else "engine",
        together[0].batching,
        prompt_tokens,
        answer_tokens,
        tuple(medians_of(found)),
        turned,
    )


def request_of(model: Any, prompt: list[int], tokens: int) -> Request:
    """A greedy request whose answer has so many tokens: none that ends a text is chosen."""
    bias = dict.fromkeys(ends_of(model.generation_config), -100.0)
    return Request(prompt=prompt, max_new_tokens=tokens, sampling=Sampling(temperature=0, logit_bias=bias))


def vocabulary_of(model: Any) -> int:
    """Tokens that prompts are drawn from."""
    return int(model.config.get_text_config(decoder=True).vocab_size)
