"""Commands that take dataclasses of options, and the few options that only the command line has. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import Field, fields
from inspect import Parameter, cleandoc, signature
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperGroup
from typer.models import OptionInfo

from ..errors import RequestError
from ..planning.option import Checked, about, name_of
from ..planning.spelling import as_flags, flag
from ..progress import quiet
from .envelope import take

Command = Callable[..., None]
_UsageError: Any = typer.BadParameter.__bases__[0]  # which typer does not show under a name


class WholeHelp(TyperGroup):
    """A group whose help has the first paragraph of each command's whole, over as many lines as it takes."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the list of commands."""
        found = ((name, self.get_command(ctx, name)) for name in self.list_commands(ctx))
        rows = [(name, _first_paragraph(one.help or "")) for name, one in found if one is not None and not one.hidden]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def _first_paragraph(text: str) -> str:
    return " ".join(cleandoc(text).split("\n\n")[0].split())


class OneLineErrors(WholeHelp):
    """A group of commands in which a wrong way to call one is a RequestError, as everything that is refused."""

    def make_context(self, *given: Any, **extra: Any) -> Any:
        """As the group that it is."""
        with _in_one_line():
            return super().make_context(*given, **extra)

    def invoke(self, ctx: Any) -> Any:
        """As the group that it is."""
        with _in_one_line():
            return super().invoke(ctx)


@contextmanager
def _in_one_line() -> Iterator[None]:
    try:
        with as_flags():
            yield
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # whose message is the whole help
            raise
        said = " ".join(error.format_message().split()).rstrip(".")
        where = "moestro" if error.ctx is None else error.ctx.command_path
        raise RequestError(f"{said}; {where} --help lists what there is") from None


def takes_options(
    *, only: Sequence[str] | None = None, leave_out: Sequence[str] = (), **defaults: Any
) -> Callable[[Command], Command]:
    """Have a command take the fields of a dataclass as options where it has a parameter of such a dataclass.

    What the command line gives is checked before the command is called. A field that two dataclasses have is one
    option, which both receive.

    Args:
        only: names of the fields to take, in any of the dataclasses; None for all.
        leave_out: names of fields not to take, which keep their defaults.
        defaults: by field name, this command's own defaults.
    """

    def wrap(command: Command) -> Command:
        own = signature(command, eval_str=True).parameters
        kinds: dict[str, type[Checked]] = {
            name: one.annotation
            for name, one in own.items()
            if isinstance(one.annotation, type) and issubclass(one.annotation, Checked)
        }
        taken = {
            name: [
                one
                for one in fields(kind)
                if (only is None or one.name in only) and one.name not in leave_out and not about(one).in_python
            ]
            for name, kind in kinds.items()
        }
        parameters: dict[str, Parameter] = {}
        for name, one in own.items():
            if name not in kinds:
                parameters[name] = one.replace(kind=Parameter.KEYWORD_ONLY)
            for field in taken.get(name, ()):
                default = defaults.get(field.name, field.default)
                parameters.setdefault(field.name, _parameter(kinds[name], field, default))

        def called(**given: Any) -> None:
            values = {
                name: kind(**{field.name: given[field.name] for field in taken[name]}) for name, kind in kinds.items()
            }
            take(
                {shown: given[name] for name in own if name not in kinds and (shown := _shown_name(own[name]))}
                | {name_of(one): getattr(values[name], one.name) for name in kinds for one in taken[name]}
            )
            with quiet(bool(given.get("as_json"))):
                command(**{name: given[name] for name in own if name not in kinds}, **values)

        wrapper: Any = called
        wrapper.__name__, wrapper.__doc__ = command.__name__, command.__doc__
        wrapper.__signature__ = signature(called).replace(parameters=list(parameters.values()))
        wrapper.__annotations__ = {name: one.annotation for name, one in parameters.items()}
        return called

    return wrap


def _shown_name(parameter: Parameter) -> str | None:
    """The name of the option that a command's own parameter is, None of arguments and of --json."""
    for one in get_args(parameter.annotation):
        if isinstance(one, OptionInfo) and parameter.name != "as_json":
            flags = [each for each in (one.default, *(one.param_decls or ())) if str(each).startswith("--")]
            return str(flags[0]).split("/")[0][2:].replace("-", "_") if flags else parameter.name
    return None


def _parameter(kind: type[Checked], field: Field[Any], default: Any) -> Parameter:
    """The parameter that typer reads, for a field of a dataclass of options."""
    what, hint = about(field), get_type_hints(kind)[field.name]
    name, shows_default = flag(name_of(field)), what.unset is None or default != field.default
    flags = [f"{name}/--no-{name[2:]}" if default is True else name, *([what.short] if what.short else [])]
    if get_origin(hint) is Sequence:
        value: Any = list[get_args(hint)[0]]  # type: ignore[misc]
        default = list(default)
    else:
        value = next(iter(get_args(hint)), hint)  # of a union, what the command line can write
        value = value | None if default is None else value
    text = what.help if shows_default else what.text
    given = typer.Option(*flags, metavar=what.metavar, help=text, show_default=shows_default)
    return Parameter(field.name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[value, given])


def unset(metavar: str | None, help: str, default: str, *flags: str, **more: Any) -> Any:
    """An option that is None where it is not given, whose help says in words what that stands for."""
    return typer.Option(*flags, metavar=metavar, help=f"{help} [default: {default}]", show_default=False, **more)


Model = Annotated[
    str | None, typer.Argument(help="A checkpoint's folder, a hub id, or demo.", metavar="MODEL", show_default=False)
]
RecordedTrace = Annotated[
    str | None, typer.Argument(help="A file that moestro trace wrote.", metavar="TRACE", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print one line of JSON last, and no text before it.")]
Layers = Annotated[int | None, unset("N", "Cut the depth to so many layers.", "all", min=1)]
TextFile = Annotated[str, typer.Option("--text", metavar="FILE", help="The text to read.", show_default=False)]
TraceTokens = Annotated[int, typer.Option("--tokens", metavar="N", min=1, help="Tokens to decode in all.")]
PromptTokens = Annotated[int, typer.Option(metavar="N", min=1, help="Prompt tokens of each piece of the text.")]
DecodeTokens = Annotated[int, typer.Option(metavar="N", min=1, help="Tokens of each piece to decode after its prompt.")]
TimelineFile = Annotated[str | None, unset("FILE", "Keep what each lane did, as a Chrome trace.", "no", "--timeline")]
