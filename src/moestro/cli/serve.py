"""`moestro serve`: what the command line does around a server. Imports neither torch nor FastAPI before it must."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ..errors import RequestError
from ..loading.once import remembering
from ..planning.budget import format_bytes
from ..planning.options import ModelOptions, Options
from ..serve.options import DEFAULT_CONTEXT, KEY_VARIABLE, ServeOptions
from .load import load_all
from .options import Model, takes_options
from .preflight import check_model, check_named, check_readable
from .terminal import say

if TYPE_CHECKING:
    from ..serve.service import Loaded

_NEEDED = ("fastapi", "uvicorn", "prometheus_client")


@takes_options(leave_out=("sequences",))
def serve(source: ModelOptions, engine: Options, options: ServeOptions, model: Model = None) -> None:
    """Serve a model by the protocols of OpenAI and Anthropic. Ctrl-C finishes what is being answered, twice cuts it."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise RequestError(f"a server needs {', '.join(missing)}; pip install 'moestro[serve]'")
    with remembering():
        check_named(model, source)
        check_readable(engine.profile, "trace")
        check_model(model, source)
    from ..serve.guard import is_loopback
    from ..serve.listen import bound, leave_process, log_requests, server_for
    from ..serve.service import Service

    at = bound(options.host, options.port)
    port = at.getsockname()[1]
    name = options.served_name or model or source.shape or ""
    service = Service(
        name,
        lambda: _loaded(model, source, engine, options),
        is_strict=options.strict_model,
        has_key=options.key is not None,
    )
    shown = f"[{options.host}]" if ":" in options.host else options.host
    say(f"serve   http://{shown}:{port} listens; {name} is being loaded, /health says when it answers")
    if options.key is None and not is_loopback(options.host):
        say(f"warning: every machine that reaches {shown} may ask, since there is no key; set {KEY_VARIABLE}")
    log_requests()
    server = server_for(
        service,
        host=options.host,
        names=options.allow_host,
        key=options.key,
        body_bytes=int(options.max_body),
    )
    server.run(sockets=[at])
    if service.error is not None:
        say(f"error: {service.error}")
        sys.stderr.flush()
    leave_process(0 if service.error is None else 1 if service.is_fault else 2)


def _loaded(model: str | None, source: ModelOptions, engine: Options, options: ServeOptions) -> Loaded:
    """The model with its engine; for the loading thread."""
    from ..loading.context import model_context
    from ..serve.engine import Engine
    from ..serve.service import Loaded

    loaded, tokenizer, *_ = load_all(model, source, replace(engine, sequences=options.max_requests))
    most = model_context(loaded.config)
    context = engine.context or min(DEFAULT_CONTEXT, most or DEFAULT_CONTEXT)
    made: Any = Engine(
        loaded,
        tokenizer,
        max_requests=options.max_requests,
        context=context,
        queue=options.queue,
        prefix_bytes=int(options.prefix_memory),
    )
    say(
        f"serve   {made.max_requests} requests of {made.context} tokens at a time, {made.batching}; keys and values "
        f"{format_bytes(made.kv_bytes)}, and up to {format_bytes(int(options.prefix_memory))} for prefixes"
    )
    return Loaded(loaded, tokenizer, made)
