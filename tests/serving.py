"""A server of the demo model on loopback, in a thread of the test's process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from moestro import load, load_tokenizer
from moestro.serve.engine import Engine
from moestro.serve.listen import bound, server_for
from moestro.serve.requests import Request
from moestro.serve.service import Loaded, Service
from moestro.serve.ticket import Ticket

# Marks of what is thought and of calls, as Qwen's family has them.
TEMPLATE = """{%- if tools %}<|im_start|>system
Tools: {{ tools | tojson }}
Answer with <tool_call>{"name": ..., "arguments": ...}</tool_call>.<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{% if message.reasoning_content %}<think>
{{ message.reasoning_content }}
</think>
{% endif %}{{ message.content or '' }}
{%- for call in message.tool_calls or [] %}
<tool_call>
{{ {"name": call.function.name, "arguments": call.function.arguments} | tojson }}
</tool_call>
{%- endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}{% endif %}"""


def loaded(
    *, max_requests: int = 4, context: int = 512, queue: int = 8, template: str | None = None, **more: Any
) -> Loaded:
    """The demo model with an engine."""
    model, tokenizer = load("demo", dtype="float32", threads=1, device="cpu"), load_tokenizer("demo")
    tokenizer.chat_template = template
    engine = ScriptedEngine(model, tokenizer, max_requests=max_requests, context=context, queue=queue, **more)
    return Loaded(model, tokenizer, engine)


class ScriptedEngine(Engine):
    """Answers by the model, or with a text where there is one.

    script: the text of every answer from now on; "" for the model's own.
    """

    script = ""

    def submit(self, request: Request, wake: Callable[[], None] | None = None) -> Ticket:
        """As the engine; the tokens of the script are the only ones that the model can choose."""
        if self.script:
            tokens = [*self._tokenizer(self.script, add_special_tokens=False).input_ids, self._tokenizer.eos_token_id]
            request = replace(request, constraint=_Script(tokens))
        return super().submit(request, wake)


class _Script:
    thinking = None

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = tokens

    def mask(self, logits: torch.Tensor) -> None:
        logits.fill_(-torch.inf)
        logits[self._tokens[0]] = 0.0

    def accept(self, token: int) -> None:
        self._tokens.pop(0)


@contextmanager
def serving(
    service: Service, *, on_bound: Callable[[str], object] = lambda address: None, **more: Any
) -> Iterator[str]:
    """The address of a running server, once its model is loaded or could not be.

    Args:
        on_bound: called with the address before the model is loaded.
        more: arguments of `server_for`.
    """
    at = bound("127.0.0.1", 0)
    address = f"http://127.0.0.1:{at.getsockname()[1]}"
    on_bound(address)
    server = server_for(service, host="127.0.0.1", **more)
    thread = threading.Thread(target=server.run, args=([at],), daemon=True)
    thread.start()
    try:
        end = time.monotonic() + 60
        while not server.started or service.state == "loading":
            assert time.monotonic() < end
            assert thread.is_alive()
            time.sleep(0.01)
        yield address
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive(), "the server has not ended"
