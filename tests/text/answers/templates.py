"""Chat templates whose forms of calls are those of published ones that no package here brings, written for the tests.

What matters of each is what it writes around a call: the marks, the JSON, their order.
"""

SMOLLM2 = (
    "{% if tools %}<|im_start|>system\nYou have access to the following tools:\n<tools>{{ tools | tojson }}</tools>\n"
    'Answer with calls alone:\n<tool_call>[\n{"name": "func_name1", "arguments": {"argument1": "value1"}}]</tool_call>'
    "<|im_end|>\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% if m.tool_calls %}<tool_call>[{% for c in m.tool_calls %}"
    '{{ \'{"name": "\' ~ c.function.name ~ \'", "arguments": \' ~ (c.function.arguments | tojson) ~ "}" }}'
    "{% if not loop.last %}, {% endif %}{% endfor %}]</tool_call>{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""SmolLM2's own template knows no tools; this is what its authors tell users to write, as a template."""

SMOLLM3 = (
    "<|im_start|>system\n{% if xml_tools is defined %}<tools>\n"
    "{% for tool in xml_tools %}{{ tool | string }}\n{% endfor %}"
    "</tools>\n\nFor each function call, return a json object with function name and arguments:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>{% endif %}<|im_end|>\n'
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n{% endif %}{% endif %}"
)

_MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
    "{% if tools and loop.first %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "[INST]{{ m.content }}[/INST]{% else %}{{ m.content or '' }}{% if m.tool_calls %}CALLS{% endif %}"
    "{{ eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = _MISTRAL.replace(
    "CALLS",
    '[TOOL_CALLS] [{% for c in m.tool_calls %}{{ (c.function | tojson)[:-1] }}, "id": "abcdefghi"}'
    "{% if not loop.last %}, {% endif %}{% endfor %}]",
)
MISTRAL_NAMED = _MISTRAL.replace(
    "CALLS",
    "{% for c in m.tool_calls %}{{ '[TOOL_CALLS]' ~ c.function.name ~ '[ARGS]' ~ (c.function.arguments | tojson) }}"
    "{% endfor %}",
).replace("{{ bos_token }}", "{{ bos_token }}[SYSTEM_PROMPT]Think: [THINK]your thoughts[/THINK] answer[/SYSTEM_PROMPT]")
MISTRAL_IDS = MISTRAL_NAMED.replace("c.function.name ~ '[ARGS]'", "c.function.name ~ '[CALL_ID]abcdefghi[ARGS]'")
_CALLS = (
    "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' ~ (m.content or '') }}"
    "{% if m.tool_calls %}CALLS{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
KIMI_K2 = "{% if tools %}{{ tools | tojson }}{% endif %}{% set at = namespace(n=0) %}" + _CALLS.replace(
    "CALLS",
    "<|tool_calls_section_begin|>{% for c in m.tool_calls %}"
    "{{ '<|tool_call_begin|>functions.' ~ c.function.name ~ ':' ~ at.n ~ '<|tool_call_argument_begin|>' }}"
    "{{ (c.function.arguments | tojson) ~ '<|tool_call_end|>' }}{% set at.n = at.n + 1 %}{% endfor %}"
    "<|tool_calls_section_end|>",
)
DEEPSEEK_V3 = "{% if tools %}{{ tools | tojson }}{% endif %}" + _CALLS.replace(
    "CALLS",
    "<｜tool▁calls▁begin｜>{% for c in m.tool_calls %}{% if not loop.first %}{{ '\n' }}{% endif %}"
    "{{ '<｜tool▁call▁begin｜>' ~ c.type ~ '<｜tool▁sep｜>' ~ c.function.name ~ '\n```json\n' }}"
    "{{ (c.function.arguments | tojson) ~ '\n```<｜tool▁call▁end｜>' }}{% endfor %}<｜tool▁calls▁end｜>",
)
DEEPSEEK_V31 = "{% if tools %}{{ tools | tojson }}{% endif %}" + _CALLS.replace(
    "CALLS",
    "<｜tool▁calls▁begin｜>{% for c in m.tool_calls %}"
    "{{ '<｜tool▁call▁begin｜>' + c.function.name + '<｜tool▁sep｜>' + c['function']['arguments'] + "
    "'<｜tool▁call▁end｜>' }}{% endfor %}<｜tool▁calls▁end｜>",
)
"""This one wants arguments as text, and adds them to the line."""
GLM47 = "{% if tools %}{{ tools | tojson }}{% endif %}" + _CALLS.replace(
    "CALLS",
    "{% for c in m.tool_calls %}{{ '<tool_call>' ~ c.function.name }}{% for k, v in c.function.arguments.items() %}"
    "<arg_key>{{ k }}</arg_key><arg_value>{{ v if v is string else (v | tojson) }}</arg_value>{% endfor %}"
    "</tool_call>{% endfor %}",
)
"""GLM 4.7 writes no line ends between the tags, as 4.5 and 4.6 do."""
_JSON_LIST = (
    '{% for c in m.tool_calls %}{{ \'{"name": "\' ~ c.function.name ~ \'", "arguments": \' }}'
    "{{ (c.function.arguments | tojson) ~ '}' }}{% if not loop.last %}, {% endif %}{% endfor %}]"
)
GRANITE3 = (
    "{% if tools %}When a tool is required, respond only with <|tool_call|> followed by a JSON list of tools used: "
    "{{ tools | tojson }}{% endif %}" + _CALLS.replace("CALLS", "<|tool_call|>[" + _JSON_LIST)
)
PHI4_MINI = (
    '{% if tools %}Call as functools[{"name": [function name], "arguments": [function arguments as JSON]}, ...]: '
    "{{ tools | tojson }}{% endif %}" + _CALLS.replace("CALLS", "functools[" + _JSON_LIST)
)
SECTION_TOKENS = (
    *("<|tool_calls_section_begin|>", "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"),
    *("<|tool_calls_section_end|>", "<|tool_call|>", "<|tool_call_start|>", "<|tool_call>", "<tool_call|>", '<|"|>'),
    *("<|tool_response>", "<|channel>", "<channel|>", "<|turn>", "<turn|>"),
    *(
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁call▁begin｜>",
        "<｜tool▁sep｜>",
        "<｜tool▁call▁end｜>",
        "<｜tool▁calls▁end｜>",
    ),
)
"""Control tokens of the families whose calls have marks of their own. (LFM2's closing mark is text here.)"""
MISTRAL_TOKENS = (
    *("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
    *("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]"),
)
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
LLAMA_TOKENS = (
    *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>"),
)
