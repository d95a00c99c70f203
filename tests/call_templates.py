"""How families write an answer with calls of tools, in short: the part of their chat templates that tells them apart."""

# ruff: noqa: E501

_TALK = "{% for m in messages %}{% if m.role != 'assistant' %}<|{{ m.role }}|>{{ m.content }}{% else %}<|assistant|>"
_END = "<|end|>{% endif %}{% endfor %}<|assistant|>"
_TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}"
_EACH = "{{ m.content or '' }}{% for c in m.tool_calls or [] %}"
_THOUGHT = "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"


def _template(calls: str, *, thinks: bool = True) -> str:
    return _TOOLS + _TALK + (_THOUGHT if thinks else "") + calls + _END


_PARAMETERS = "{% for k, v in c.function.arguments.items() %}"
_VALUE = "{{ v if v is string else v | tojson }}"

CALL_TEMPLATES = {
    "hermes": _template(
        _EACH
        + "\n<tool_call>\n{{ {'name': c.function.name, 'arguments': c.function.arguments} | tojson }}\n</tool_call>{% endfor %}"
    ),
    "qwen3-coder": _template(
        _EACH
        + "\n<tool_call>\n<function={{ c.function.name }}>\n"
        + _PARAMETERS
        + "<parameter={{ k }}>\n"
        + _VALUE
        + "\n</parameter>\n{% endfor %}</function>\n</tool_call>{% endfor %}"
    ),
    "seed-oss": _template(
        _EACH
        + "\n<seed:tool_call>\n<function={{ c.function.name }}>\n"
        + _PARAMETERS
        + "<parameter={{ k }}>\n"
        + _VALUE
        + "\n</parameter>\n{% endfor %}</function>\n</seed:tool_call>{% endfor %}"
    ),
    "mistral": _template(
        "{{ m.content or '' }}{% if m.tool_calls %}[TOOL_CALLS][{% for c in m.tool_calls %}{{ {'name': c.function.name, "
        "'arguments': c.function.arguments, 'id': c.id} | tojson }}{{ ', ' if not loop.last }}{% if c.id | length != 9 %}"
        "{{ raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}{% endif %}{% endfor %}]{% endif %}",
        thinks=False,
    ),
    "mistral-11": _template(
        _EACH + "[TOOL_CALLS]{{ c.function.name }}[ARGS]{{ c.function.arguments | tojson }}{% endfor %}", thinks=False
    ),
    "gpt-oss": _TOOLS
    + "{% for m in messages %}{% if m.role == 'assistant' %}{% if m.tool_calls %}{% if m.content and m.thinking %}"
    "{{ raise_exception('Cannot pass both content and thinking in an assistant message with tool calls!') }}{% endif %}"
    "{% if m.content or m.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ m.content or m.thinking }}<|end|>{% endif %}"
    "{% for c in m.tool_calls %}<|start|>assistant to=functions.{{ c.function.name }}<|channel|>commentary json<|message|>"
    "{{ c.function.arguments | tojson }}<|call|>{% endfor %}{% else %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>{% endif %}"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}<|start|>assistant",
    "deepseek-v3": _template(
        "{{ m.content or '' }}{% if m.tool_calls %}<｜tool▁calls▁begin｜>{% for c in m.tool_calls %}<｜tool▁call▁begin｜>function"
        "<｜tool▁sep｜>{{ c.function.name }}\n```json\n{{ '' + c.function.arguments }}\n```<｜tool▁call▁end｜>{{ '\n' if not loop.last }}"
        "{% endfor %}<｜tool▁calls▁end｜>{% endif %}"
    ),
    "deepseek-v3.1": _template(
        "{{ m.content or '' }}{% if m.tool_calls %}<｜tool▁calls▁begin｜>{% for c in m.tool_calls %}<｜tool▁call▁begin｜>"
        "{{ c.function.name + '<｜tool▁sep｜>' + c.function.arguments }}<｜tool▁call▁end｜>{% endfor %}<｜tool▁calls▁end｜>{% endif %}"
    ),
    "deepseek-v3.2": _template(
        "{{ m.content or '' }}{% if m.tool_calls %}\n\n<｜DSML｜function_calls>\n{% for c in m.tool_calls %}<｜DSML｜invoke name=\"{{ c.function.name }}\">\n"
        + _PARAMETERS
        + "<｜DSML｜parameter name=\"{{ k }}\" string=\"{{ 'true' if v is string else 'false' }}\">"
        + _VALUE
        + "</｜DSML｜parameter>\n{% endfor %}</｜DSML｜invoke>\n{% endfor %}</｜DSML｜function_calls>{% endif %}"
    ),
    "kimi": _template(
        "{{ m.content or '' }}{% if m.tool_calls %}<|tool_calls_section_begin|>{% for c in m.tool_calls %}<|tool_call_begin|>{{ c.id }}"
        "<|tool_call_argument_begin|>{{ c.function.arguments if c.function.arguments is string else c.function.arguments | tojson }}"
        "<|tool_call_end|>{% endfor %}<|tool_calls_section_end|>{% endif %}"
    ),
    "minimax": _template(
        "{{ m.content or '' }}{% if m.tool_calls %}\n<minimax:tool_call>\n{% for c in m.tool_calls %}<invoke name=\"{{ c.function.name }}\">\n"
        + _PARAMETERS
        + '<parameter name="{{ k }}">'
        + _VALUE
        + "</parameter>\n{% endfor %}</invoke>\n{% endfor %}</minimax:tool_call>{% endif %}"
    ),
    "glm-4.5": _template(
        _EACH
        + "\n<tool_call>{{ c.function.name }}\n"
        + _PARAMETERS
        + "<arg_key>{{ k }}</arg_key>\n<arg_value>"
        + _VALUE
        + "</arg_value>\n{% endfor %}</tool_call>{% endfor %}"
    ),
    "gemma-4": "{% macro value(v) %}{% if v is string %}<|\"|>{{ v }}<|\"|>{% elif v is boolean %}{{ 'true' if v else 'false' }}{% elif v is mapping %}"
    "{ {%- for k, one in v | dictsort %}{{ k }}:{{ value(one) }}{{ ',' if not loop.last }}{% endfor -%} }{% elif v is sequence %}[{% for one in v %}"
    "{{ value(one) }}{{ ',' if not loop.last }}{% endfor %}]{% else %}{{ v }}{% endif %}{% endmacro %}"
    + _template(
        _EACH + "<|tool_call>call:{{ c.function.name }}{{ value(c.function.arguments) }}<tool_call|>{% endfor %}",
        thinks=False,
    ),
    "hunyuan": _template(
        "{{ m.content or '' }}{% if m.tool_calls %}\n<tool_calls>[{% for c in m.tool_calls %}{{ {'name': c.function.name, 'arguments': "
        "c.function.arguments} | tojson }}{{ ', ' if not loop.last }}{% endfor %}]</tool_calls>{% endif %}"
    ),
    "granite-3": _template(
        "{{ m.content or '' }}{% if m.tool_calls %}<|tool_call|>[{% for c in m.tool_calls %}{{ {'name': c.function.name, 'arguments': "
        "c.function.arguments} | tojson }}{{ ', ' if not loop.last }}{% endfor %}]{% endif %}",
        thinks=False,
    ),
    "lfm2": _template(
        "{{ m.content or '' }}{% if m.tool_calls %}<|tool_call_start|>[{% for c in m.tool_calls %}{{ c.function.name }}("
        "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v | tojson }}{{ ', ' if not loop.last }}{% endfor %})"
        "{{ ', ' if not loop.last }}{% endfor %}]<|tool_call_end|>{% endif %}"
    ),
    "llama": _template(
        "{{ m.content or '' }}{% for c in m.tool_calls or [] %}{{ '{\"name\": \"' + c.function.name + '\", \"parameters\": ' }}"
        "{{ c.function.arguments | tojson }}{{ '}' }}{% endfor %}",
        thinks=False,
    ),
}
# Marks that the families have as tokens of their own.
CALL_TOKENS = {
    "mistral": ["[TOOL_CALLS]", "[ARGS]"],
    "mistral-11": ["[TOOL_CALLS]", "[ARGS]"],
    "gpt-oss": ["<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|call|>"],
    "deepseek-v3": [
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁end｜>",
        "<｜tool▁call▁begin｜>",
        "<｜tool▁call▁end｜>",
        "<｜tool▁sep｜>",
    ],
    "deepseek-v3.1": [
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁end｜>",
        "<｜tool▁call▁begin｜>",
        "<｜tool▁call▁end｜>",
        "<｜tool▁sep｜>",
    ],
    "kimi": [
        "<|tool_calls_section_begin|>",
        "<|tool_calls_section_end|>",
        "<|tool_call_begin|>",
        "<|tool_call_argument_begin|>",
        "<|tool_call_end|>",
    ],
    "gemma-4": ["<|tool_call>", "<tool_call|>", '<|"|>'],
    "granite-3": ["<|tool_call|>"],
    "lfm2": ["<|tool_call_start|>", "<|tool_call_end|>"],
}
