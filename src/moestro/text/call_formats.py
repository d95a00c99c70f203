"""Which form of tool calls a tokenizer's family has, by its response template, or by the marks in its chat template."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import regex
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_parsing.content_parsers import process_field
from transformers.utils.chat_parsing.response_templates import ResponseTemplateField

from .calls import Call, Format, Grammar, MalformedError, Tools, call_of
from .json_calls import Either, NamedJson, WholeJson
from .marked_calls import Gemma, Marked, Python
from .typed import typed_value

_HARMONY_OPEN = (
    r"(?:<\|start\|>assistant)?\s*to=functions\.(?P<name>[^\s<]+)\s*<\|channel\|>[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>"
    r"|(?:<\|start\|>assistant)?<\|channel\|>\w+\s+to=functions\.(?P<other_name>[^\s<]+)[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>"
)
_HARMONY = NamedJson(
    "<|channel|>",
    pattern=_HARMONY_OPEN,
    tokens=("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|call|>", "<|end|>", "<|return|>"),
    closes=("<|call|>", "<|end|>", "<|return|>"),
    before="<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>",
    after="<|call|>",
)


def _deepseek(template: str) -> Format:
    """V3 and R1 write a line of Markdown around the arguments, V3.1 does not."""
    is_old = "```json" in template or "function<｜tool▁sep｜>" in template
    return NamedJson(
        "<｜tool▁call▁begin｜>",
        section=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
        tokens=("<｜tool▁sep｜>", "<｜tool▁call▁end｜>"),
        head=r"\s*function<｜tool▁sep｜>(?P<name>[^\n<]+)\n```(?:json)?\s(?=\s*\{)|\s*(?P<other_name>[^\n<]+?)<｜tool▁sep｜>(?=\s*\{)",
        closes=("```<｜tool▁call▁end｜>", "```\n<｜tool▁call▁end｜>", "<｜tool▁call▁end｜>"),
        before="<｜tool▁call▁begin｜>"
        + ("function<｜tool▁sep｜>{name}\n```json\n" if is_old else "{name}<｜tool▁sep｜>"),
        after=("\n```" if is_old else "") + "<｜tool▁call▁end｜>",
    )


def _kimi(template: str) -> Format:
    return NamedJson(
        "<|tool_call_begin|>",
        section=("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
        tokens=("<|tool_call_argument_begin|>", "<|tool_call_end|>"),
        head=r"\s*(?:functions\.)?(?P<name>[^<\s]+?)(?::\d+)?\s*<\|tool_call_argument_begin\|>",
        closes=("<|tool_call_end|>",),
        before="<|tool_call_begin|>functions.{name}:0<|tool_call_argument_begin|>",
        after="<|tool_call_end|>",
    )


def _mistral(template: str) -> Format:
    named = NamedJson(
        "[TOOL_CALLS]",
        tokens=("[CALL_ID]", "[ARGS]"),
        head=r"\s*(?P<name>[^\s\[{]+)\s*(?:\[CALL_ID\][^\[{]*)?(?:\[ARGS\])?(?=\s*\{)",
        before="[TOOL_CALLS]{name}[ARGS]",
    )
    listed = WholeJson("[TOOL_CALLS]", is_list=True)
    tokens = named.tokens
    return Either("[TOOL_CALLS]", tokens=tokens, forms=(named, listed) if "[ARGS]" in template else (listed, named))


def _invoked(prefix: str, section: str, more: str = "") -> Marked:
    key = rf'<{prefix}parameter name="(?P<key>[^"]*)"' + (r' string="(?P<is_text>true|false)"' if more else "") + ">"
    return Marked(
        f'<{prefix}invoke name="',
        section=(f"<{section}>", f"</{section}>"),
        tokens=(f"<{prefix}invoke", prefix.strip("|") or section),
        head=r'(?P<name>[^"<>\n]*)">',
        key=key,
        ends=f"</{prefix}parameter>",
        close=rf"</{prefix}invoke>",
        begin=f'<{prefix}invoke name="{{name}}">\n',
        key_text=f'<{prefix}parameter name="{{key}}"{more}>',
        between="\n",
        end=f"</{prefix}invoke>\n",
    )


def _functions(open_: str, close: str) -> Marked:
    """As Qwen3-Coder: <function=NAME><parameter=KEY>."""
    return Marked(
        open_,
        head=r"\s*<function=(?P<name>[^>\n]+)>",
        key=r"<parameter=(?P<key>[^>\n]+)>",
        ends="</parameter>",
        close=rf"</function>\s*{regex.escape(close)}",
        breaks=True,
        begin=open_ + "\n<function={name}>\n",
        key_text="<parameter={key}>\n",
        between="\n",
        end=f"</function>\n{close}",
    )


_HERMES = WholeJson("<tool_call>", close="</tool_call>", joint="\n")
_GLM = Marked(
    "<tool_call>",
    head=r"\s*(?P<name>[^\s<{]+)\s*(?=<)",
    key=r"<arg_key>(?P<key>.*?)</arg_key>\s*<arg_value>",
    ends="</arg_value>",
    close="</tool_call>",
    begin="<tool_call>{name}\n",
    key_text="<arg_key>{key}</arg_key>\n<arg_value>",
    between="\n",
    end="</tool_call>",
)
_QWEN = _functions("<tool_call>", "</tool_call>")


def _tool_call(*forms: Format) -> Callable[[str], Format]:
    return lambda template: Either("<tool_call>", tokens=("</tool_call>", "<arg_key>", "<arg_value>"), forms=forms)


def _bare(template: str) -> Format:
    forms = (WholeJson("", keys=("name", "parameters")), Python(""))
    return Either("", forms=forms)


_KNOWN: tuple[tuple[str, Callable[[str], Format]], ...] = (
    # What a chat template has in it -> the form. The first that is found is taken, so the rarer mark comes first.
    ("｜DSML｜function_calls", lambda template: _invoked("｜DSML｜", "｜DSML｜function_calls", ' string="{is_text}"')),
    ("｜DSML｜tool_calls", lambda template: _invoked("｜DSML｜", "｜DSML｜tool_calls", ' string="{is_text}"')),
    ("<｜tool▁calls▁begin｜>", _deepseek),
    ("<|tool_calls_section_begin|>", _kimi),
    ("<minimax:tool_call>", lambda template: _invoked("", "minimax:tool_call")),
    ("[TOOL_CALLS]", _mistral),
    ("<|tool_call>", lambda template: Gemma("<|tool_call>", tokens=("<tool_call|>", '<|"|>'))),
    ("<seed:tool_call>", lambda template: _functions("<seed:tool_call>", "</seed:tool_call>")),
    ("<arg_key>", _tool_call(_GLM, _HERMES)),
    ("<function=", _tool_call(_QWEN, _HERMES)),
    ("<tool_calls>", lambda template: WholeJson("<tool_calls>", close="</tool_calls>", is_list=True)),
    ("<tool_call>", _tool_call(_HERMES, _QWEN)),
    ("<|tool_call_start|>", lambda template: Python("<|tool_call_start|>", close="<|tool_call_end|>")),
    ("<|tool_call|>", lambda template: WholeJson("<|tool_call|>", is_list=True)),
    ("<TOOLCALL>", lambda template: WholeJson("<TOOLCALL>", close="</TOOLCALL>", is_list=True)),
)


def find_format(tokenizer: PreTrainedTokenizerBase, own: Any, is_harmony: bool) -> Format | None:
    """The form of a tokenizer's calls; None where its chat template has no tools, or none that are known.

    Args:
        own: the tokenizer's own response template, as Transformers has read it, or None.
        is_harmony: whether it has Harmony's channels.
    """
    template = tokenizer.chat_template
    text = "\n".join(map(str, template.values())) if isinstance(template, dict) else str(template or "")
    if not regex.search(r"\btools\b", text):
        return None
    field = None if own is None else own.fields.get("tool_calls")
    if field is not None and field.open_re is not None:
        known = _HARMONY if is_harmony else _known(tokenizer, text)
        return _Own(field.open_re.pattern, pattern=field.open_re.pattern, field=field, known=known)
    return _HARMONY if is_harmony else _known(tokenizer, text)


def _known(tokenizer: PreTrainedTokenizerBase, text: str) -> Format | None:
    for seen in (text, "\n".join(tokenizer.get_added_vocab())):
        for mark, make in _KNOWN:
            if mark in seen:
                return make(text)
    return _bare(text) if '"parameters"' in text or "'parameters'" in text else None


@dataclass(frozen=True)
class _Own(Format):
    """As the field for tool calls in a tokenizer's own response template says."""

    field: ResponseTemplateField | None = None
    known: Format | None = None  # the form that the chat template shows, which can be written

    def read(self, opened: Any, body: str, tools: Tools, is_end: bool) -> tuple[list[Call], int] | None:
        """As `Format` says."""
        field = self.field
        assert field is not None
        at = 0
        while field.close_re is not None and (found := field.close_re.search(body, at)):
            if not is_end and found.end() == len(body) and field.close_literals is None:
                return None  # it may be longer
            try:
                return self._calls(body[: found.start()], opened, tools), found.end()
            except MalformedError:
                at = max(found.end(), at + 1)  # an argument may hold the mark
        if not is_end:
            return None
        if field.close_re is not None and field.content != "json":
            raise MalformedError  # only JSON shows whether it is whole
        return self._calls(body, opened, tools), len(body)

    def _calls(self, body: str, opened: Any, tools: Tools) -> list[Call]:
        captures = {key: value for key, value in opened.groupdict().items() if value is not None}
        try:
            value = process_field(body, self.field, captures)
            pattern = self.field.content_args.get("tag_pattern") if self.field is not None else None
            if pattern is not None and regex.sub(pattern, "", body, flags=regex.DOTALL).strip():
                raise MalformedError  # it would be lost
        except Exception as error:  # the template's own parsers raise what they like
            raise MalformedError from error
        found = []
        for one in value if isinstance(value, list) else [value]:
            function = one.get("function", one) if isinstance(one, dict) else None
            if not isinstance(function, dict):
                raise MalformedError
            name, arguments = function.get("name"), function.get("arguments", {})
            schema = tools.get(str(name), {})
            if isinstance(arguments, dict) and getattr(self.field, "content", "") != "json":
                arguments = {
                    key: typed_value(one, schema, key) if isinstance(one, str) else one
                    for key, one in arguments.items()
                }
            found.append(call_of(name, arguments))
        if not found:
            raise MalformedError
        return found

    def grammar(self, write: Grammar, tools: Tools) -> str | None:
        """As `Format` says."""
        return None if self.known is None else self.known.grammar(write, tools)
