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
MISTRAL_TOKENS = (
    *("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
    *("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]"),
)
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
LLAMA_TOKENS = (
    *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>"),
)
