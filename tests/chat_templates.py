"""Chat templates as checkpoints have them, in short: what they do with roles, tools, thoughts and parts."""

# ruff: noqa: E501

ALTERNATE = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
)
THINK_DROPPED = "{% set c = m['content'].split('</think>')[-1].lstrip('\\n') %}"

TEMPLATES = {
    "mixtral": "{{ bos_token }}" + ALTERNATE + "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}",
    "mistral": "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set turns = messages[1:] %}{% else %}{% set turns = messages %}{% endif %}{% for m in turns %}"
    "{% if m['role'] == 'user' %}[INST] {% if loop.last and system is defined %}{{ system + '\n\n' }}{% endif %}"
    "{{ m['content'] }}[/INST]{% else %}{{ ' ' + m['content']|trim + '</s>' }}{% endif %}{% endfor %}",
    "llama2": "{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}"
    "{% set system = messages[0]['content'] %}{% else %}{% set turns = messages %}{% set system = false %}{% endif %}"
    "{% for m in turns %}{% if loop.index0 == 0 and system != false %}"
    "{% set c = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m['content'] %}{% else %}{% set c = m['content'] %}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + c.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + c.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
    "llama3": "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'+ m['content'] | trim "
    "+ '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "qwen2.5": "{% if tools %}# Tools\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}{% elif messages[0].role != 'system' %}"
    "<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}{% for message in messages %}{% if message.role in "
    "['user', 'system'] or (message.role == 'assistant' and not message.tool_calls) %}{{ '<|im_start|>' + message.role + "
    "'\n' + message.content + '<|im_end|>\n' }}{% endif %}{% endfor %}<|im_start|>assistant\n",
    "qwen3": "{% set ns = namespace(last=messages|length - 1) %}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% set thought = m.reasoning_content if m.reasoning_content is string else '' %}{{ '<|im_start|>assistant\n' }}"
    "{% if loop.index0 > ns.last and thought %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{{ '<|im_start|>assistant\n' }}{% if enable_thinking is defined and enable_thinking is false %}"
    "<think>\n\n</think>\n\n{% endif %}",
    "deepseek-v2": "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ 'User: ' + m['content'] + '\n\n' }}"
    "{% elif m['role'] == 'assistant' %}{{ 'Assistant: ' + m['content'] + eos_token }}{% elif m['role'] == 'system' %}"
    "{{ m['content'] + '\n\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}",
    "deepseek-r1": "{% set ns = namespace(system='') %}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{% set ns.system = m['content'] %}{% endif %}{% endfor %}{{ bos_token }}{{ ns.system }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '<User>' + m['content'] }}{% elif m['role'] == 'assistant' %}"
    + THINK_DROPPED
    + "{{ '<Assistant>' + c + eos_token }}{% endif %}{% endfor %}{{ '<Assistant><think>\n' }}",
    "gemma": "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + ALTERNATE
    + "{% if m['role'] == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = m['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}<start_of_turn>model\n",
    "gemma3": "{% for m in messages %}{{ '<start_of_turn>' + m['role'] + '\n' }}{% if m['content'] is string %}"
    "{{ m['content'] | trim }}{% elif m['content'] is iterable %}{% for item in m['content'] %}{% if item['type'] == 'text' %}"
    "{{ item['text'] | trim }}{% endif %}{% endfor %}{% else %}{{ raise_exception('Invalid content type') }}{% endif %}"
    "{{ '<end_of_turn>\n' }}{% endfor %}",
    "parts": "{% for m in messages %}{% for part in m['content'] %}{{ part['text'] }}{% endfor %}\n{% endfor %}",
    "parts-typed": "{% for m in messages %}{% for p in m.content | selectattr('type', 'equalto', 'text') %}{{ p.text }}"
    "{% endfor %}{% endfor %}",
    "phi3": "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}<|assistant|>\n",
    "phimoe": "{% for m in messages %}{% if m['role'] in ('system', 'user', 'assistant') %}{{ '<|' + m['role'] + '|>' + "
    "m['content'] + '<|end|>' }}{% else %}{{ raise_exception('Unknown role ' ~ m['role']) }}{% endif %}{% endfor %}",
    "gpt-oss": "{% macro date() %}{{ strftime_now('%Y-%m-%d') }}{% endmacro %}<|start|>system<|message|>{{ date() }}<|end|>"
    "{% for m in messages %}{% if m.role == 'assistant' and 'thinking' in m and loop.last %}"
    "{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}"
    "{% if '<|channel|>' in m.content %}{{ raise_exception('put thoughts into thinking') }}{% endif %}"
    "{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endfor %}<|start|>assistant",
    "zephyr": "{% for m in messages %}\n{% if m['role'] == 'user' %}\n{{ '<|user|>\n' + m['content'] + eos_token }}\n"
    "{% elif m['role'] == 'system' %}\n{{ '<|system|>\n' + m['content'] + eos_token }}\n{% elif m['role'] == 'assistant' %}\n"
    "{{ '<|assistant|>\n'  + m['content'] + eos_token }}\n{% endif %}\n{% if loop.last and add_generation_prompt %}\n"
    "{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}",
    "vicuna": "{% set roles = {'user': 'USER', 'assistant': 'ASSISTANT', 'system': 'SYSTEM'} %}{% for m in messages %}"
    "{{ roles[m.role] ~ ': ' ~ m.content }}{{ ' ' if not loop.last else '' }}{% endfor %} ASSISTANT:",
    "alpaca": "{% for m in messages %}{{ '### ' + {'user': 'Instruction', 'assistant': 'Response'}.get(m.role, 'System') + "
    "':\n' + m.content + '\n\n' }}{% endfor %}### Response:\n",
    "command-r": "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|USER|>' + m['content'].strip() }}"
    "{% elif m['role'] == 'system' %}{{ '<|SYSTEM|>' + m['content'] }}{% else %}{{ '<|BOT|>' + m['content'].strip() }}"
    "{% endif %}{% endfor %}<|BOT|>",
    "olmoe": "{{ bos_token }}{% for m in messages %}{{ '<|' ~ m['role'] ~ '|>\n' ~ m['content'] ~ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    "granite": "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}"
    "{%- set loop_messages = messages[1:] %}{%- else %}{%- set system = 'Today is ' + strftime_now('%d %B') %}"
    "{%- set loop_messages = messages %}{%- endif %}{{- '<|role|>system' + system + '\n' }}{%- for m in loop_messages %}"
    "{{- '<|role|>' + m['role'] + m['content'] + '\n' }}{%- endfor %}",
    "jamba": "{% if messages[0].role == 'system' %}{% set system = messages.pop(0) if false else messages[0] %}{% endif %}"
    "{% for m in messages %}<|bom|><|{{ m.role }}|> {{ m.content }}<|eom|>{% endfor %}<|bom|><|assistant|>",
    "hunyuan": "{% for m in messages %}{% if m['role'] == 'assistant' and '<answer>' in m['content'] %}"
    "{% set a = m['content'].split('<answer>')[1].split('</answer>')[0] %}{{ a }}{% else %}{{ m['content'] }}{% endif %}"
    "<|eos|>{% endfor %}<|extra_0|>",
    "glm4": "[gMASK]<sop>{% for item in messages %}{% if item['tools'] is defined %}{{ item['tools'] | tojson(indent=4) }}"
    "{% endif %}{{ '<|' + item['role'] + '|>\n' + item['content'] }}{% endfor %}<|assistant|>\n",
    "ernie": "{% for m in messages %}{% if m.role == 'user' %}User: {{ m.content }}\n{% elif m.role == 'assistant' %}"
    "Assistant: {{ m.content }}<|end|>{% elif m.role == 'system' %}{{ m.content + '\n' }}{% endif %}{% endfor %}Assistant: ",
    "minimax": "{% for m in messages %}]~b]{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content %}{{ c.text if c.type == 'text' else '' }}{% endfor %}{% endif %}[e~[\n{% endfor %}]~b]ai\n<think>\n",
    "kimi": "{% for m in messages %}{% set name = m.get('name') or m['role'] %}<|im_{{ m['role'] }}|>{{ name }}<|im_middle|>"
    "{{ m['content'] }}<|im_end|>{% endfor %}<|im_assistant|>assistant<|im_middle|>",
    "openchat": "{{ bos_token }}{% for m in messages %}{{ 'GPT4 Correct ' + m['role'].title() + ': ' + m['content'] + "
    "'<|end_of_turn|>'}}{% endfor %}GPT4 Correct Assistant:",
    "magistral": "{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content if m.content is string else "
    "m.content[0].text }}[/INST]{% elif m.role == 'assistant' %}{% if m.reasoning_content is defined %}[THINK]"
    "{{ m.reasoning_content }}[/THINK]{% endif %}{{ m.content }}{% else %}[SYSTEM]{{ m.content }}[/SYSTEM]{% endif %}{% endfor %}",
    "last-only": "{{ messages[-1]['content'] }}\nAnswer:",
    "no-user": "{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}",
}
