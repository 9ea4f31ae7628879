"""Chat templates with the markup of newer models' tools, in our own words: the originals are not
at hand. What they write of tools, calls and results is what those models have learnt."""

from __future__ import annotations

QWEN_CODER = """{%- if messages[0].role == 'system' %}
    {%- set system_message = messages[0].content %}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- if tools is iterable and tools | length > 0 %}
    {{- '<|im_start|>system\\n' + (system_message or 'You call tools.') }}
    {{- '\\n\\n# Tools\\n\\n<tools>' }}
    {%- for tool in tools %}
        {%- set tool = tool.function %}
        {{- '\\n<function>\\n<name>' ~ tool.name ~ '</name>' }}
        {%- if tool.description is defined %}
            {{- '\\n<description>' ~ (tool.description | trim) ~ '</description>' }}
        {%- endif %}
        {{- '\\n<parameters>' }}
        {%- if tool.parameters is defined and tool.parameters.properties is mapping %}
            {%- for name, fields in tool.parameters.properties | items %}
                {{- '\\n<parameter>\\n<name>' ~ name ~ '</name>' }}
                {%- for key in fields.keys() | reject('in', ['type']) %}
                    {{- '\\n<' ~ key ~ '>' ~ (fields[key] | tojson) ~ '</' ~ key ~ '>' }}
                {%- endfor %}
                {{- '\\n</parameter>' }}
            {%- endfor %}
        {%- endif %}
        {{- '\\n</parameters>\\n</function>' }}
    {%- endfor %}
    {{- '\\n</tools>\\n\\nCall in this form:\\n\\n<tool_call>\\n<function=example_function>\\n' }}
    {{- '<parameter=example_parameter>\\nvalue\\n</parameter>\\n</function>\\n</tool_call>' }}
    {{- '<|im_end|>\\n' }}
{%- elif system_message is defined %}
    {{- '<|im_start|>system\\n' + system_message + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' and message.tool_calls %}
        {{- '<|im_start|>assistant' }}
        {%- if message.content %}{{- '\\n' + message.content | trim + '\\n' }}{%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- set tool_call = tool_call.function %}
            {{- '\\n<tool_call>\\n<function=' + tool_call.name + '>\\n' }}
            {%- for name, value in tool_call.arguments | items %}
                {{- '<parameter=' + name + '>\\n' }}
                {%- set value = value | tojson | safe if value is mapping or (value is sequence and value is not string) else value | string %}
                {{- value }}
                {{- '\\n</parameter>\\n' }}
            {%- endfor %}
            {{- '</function>\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.previtem and loop.previtem.role != 'tool' %}
            {{- '<|im_start|>user\\n' }}
        {%- endif %}
        {{- '<tool_response>\\n' + message.content + '\\n</tool_response>\\n' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""  # noqa: E501
GLM = """[gMASK]<sop>
{%- if tools -%}
<|system|>
# Tools

<tools>
{% for tool in tools %}
{{ tool | tojson(ensure_ascii=False) }}
{% endfor %}
</tools>

Call in this form:
<tool_call>{function-name}
<arg_key>{arg-key-1}</arg_key>
<arg_value>{arg-value-1}</arg_value>
...
</tool_call>{%- endif -%}
{%- for m in messages %}
{%- if m.role == 'user' -%}<|user|>
{{ m.content }}
{%- elif m.role == 'assistant' -%}
<|assistant|>
{%- if m.content %}{{ '\\n' + m.content.strip() }}{% endif %}
{%- for tc in m.tool_calls or [] %}
{%- set tc = tc.function %}
{{ '\\n<tool_call>' + tc.name }}
{% for k, v in tc.arguments.items() %}
<arg_key>{{ k }}</arg_key>
<arg_value>{{ v | tojson(ensure_ascii=False) if v is not string else v }}</arg_value>
{% endfor %}
</tool_call>
{%- endfor %}
{%- elif m.role == 'tool' -%}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|observation|>' }}{% endif %}
{{- '\\n<tool_response>\\n' }}{{- m.content }}{{- '\\n</tool_response>' }}
{%- else -%}<|system|>
{{ m.content }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>
{% endif %}"""
GLM_DENSE = GLM.replace("{function-name}\n<arg", "{function-name}<arg").replace(
    "</arg_key>\n<arg_value>", "</arg_key><arg_value>"
)
MISTRAL = """{{- bos_token }}
{%- if messages[0].role == 'system' %}
    {{- '[SYSTEM_PROMPT]' + messages[0].content + '[/SYSTEM_PROMPT]' }}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- if tools %}{{- '[AVAILABLE_TOOLS]' + (tools | tojson | safe) + '[/AVAILABLE_TOOLS]' }}{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '[INST]' + message.content + '[/INST]' }}
    {%- elif message.role == 'assistant' %}
        {{- message.content }}
        {%- for tool in message.tool_calls or [] %}
            {%- set arguments = tool.function.arguments %}
            {%- if arguments is not string %}{%- set arguments = arguments | tojson | safe %}{%- endif %}
            {{- '[TOOL_CALLS]' + tool.function.name + '[ARGS]' + arguments }}
        {%- endfor %}
        {{- eos_token }}
    {%- elif message.role == 'tool' %}
        {{- '[TOOL_RESULTS]' + message.content + '[/TOOL_RESULTS]' }}
    {%- endif %}
{%- endfor %}
"""  # noqa: E501
MISTRAL_IDS = MISTRAL.replace("'[ARGS]' +", "'[CALL_ID]' + tool.id + '[ARGS]' +").replace(
    "'[TOOL_RESULTS]' +", "'[TOOL_RESULTS]' + message.tool_call_id + '[TOOL_CONTENT]' +"
)
DEEPSEEK = """{{- bos_token }}
{%- for message in messages %}{%- if message.role == 'system' %}{{- message.content }}{%- endif %}{%- endfor %}
{%- if tools %}
    {{- '\\n\\n## Tools\\nYou have access to the following tools:\\n' }}
    {%- for tool in tools %}{{- '\\n### ' + tool.function.name + '\\n' + (tool.function | tojson) }}{%- endfor %}
    {{- '\\nCall as <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>name<｜tool▁sep｜>{}' }}
    {{- '<｜tool▁call▁end｜><｜tool▁calls▁end｜>' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<｜User｜>' + message.content }}
    {%- elif message.role == 'assistant' %}
        {{- '<｜Assistant｜>' + (message.content or '') }}
        {%- for tool in message.tool_calls or [] %}
            {%- if loop.first %}{{- '<｜tool▁calls▁begin｜>' }}{%- endif %}
            {{- '<｜tool▁call▁begin｜>' + tool.function.name + '<｜tool▁sep｜>' }}
            {{- tool.function.arguments | tojson }}
            {{- '<｜tool▁call▁end｜>' }}
            {%- if loop.last %}{{- '<｜tool▁calls▁end｜>' }}{%- endif %}
        {%- endfor %}
        {{- '<｜end▁of▁sentence｜>' }}
    {%- elif message.role == 'tool' %}
        {{- '<｜tool▁output▁begin｜>' + message.content + '<｜tool▁output▁end｜>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<｜Assistant｜>' }}{%- endif %}
"""  # noqa: E501
DEEPSEEK_FENCED = (
    DEEPSEEK.replace(
        "'<｜tool▁call▁begin｜>' + tool.function.name + '<｜tool▁sep｜>'",
        "'<｜tool▁call▁begin｜>function<｜tool▁sep｜>' + tool.function.name + '\\n```json\\n'",
    )
    .replace("'<｜tool▁call▁end｜>'", "'\\n```<｜tool▁call▁end｜>'")
    .replace("begin｜>name<｜tool▁sep｜>{}' }}", "begin｜>function<｜tool▁sep｜>name' }}")
)
NEMOTRON = """{{- bos_token }}
{%- for message in messages %}
    {%- if message.role in ['user', 'system'] %}
        {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
        {%- if tools and loop.first %}
            {{- '<AVAILABLE_TOOLS>' + (tools | tojson) + '</AVAILABLE_TOOLS>\\n\\n' }}
        {%- endif %}
        {{- message.content + '<|eot_id|>' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' + message.content }}
        {%- for call in message.tool_calls or [] %}
            {{- '<TOOLCALL>[' if loop.first else ', ' }}
            {{- '{"name": "' + call.function.name + '", "arguments": ' }}
            {{- (call.function.arguments | tojson) + '}' }}
            {%- if loop.last %}{{- ']</TOOLCALL>' }}{%- endif %}
        {%- endfor %}
        {{- '<|eot_id|>' }}
    {%- elif message.role == 'tool' %}
        {{- '<|start_header_id|>user<|end_header_id|>\\n\\n<TOOL_RESPONSE>[' + message.content }}
        {{- ']</TOOL_RESPONSE><|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
_CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_MISTRAL_MARKS = [
    "<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[ARGS]", "[CALL_ID]", "[TOOL_CONTENT]",
    "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]",
]  # fmt: skip
_DEEPSEEK_MARKS = [
    "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>",
    *(f"<｜tool▁{part}▁{place}｜>" for part in ("calls", "call", "output")
      for place in ("begin", "end")), "<｜tool▁sep｜>",
]  # fmt: skip
_GLM_TAGS = ["tool_call", "arg_key", "arg_value", "tool_response"]
SOURCES = {
    "qwen-xml": QWEN_CODER, "glm": GLM, "glm-dense": GLM_DENSE, "mistral-args": MISTRAL,
    "mistral-ids": MISTRAL_IDS, "deepseek": DEEPSEEK, "deepseek-fenced": DEEPSEEK_FENCED,
    "nemotron": NEMOTRON,
}  # fmt: skip
SPECIAL = {
    "qwen-xml": _CHATML,
    "glm": ["[gMASK]", "<|endoftext|>", "<sop>", "<|system|>", "<|user|>", "<|assistant|>",
            "<|observation|>"],
    "mistral-args": _MISTRAL_MARKS,
    "mistral-ids": _MISTRAL_MARKS,
    "deepseek": _DEEPSEEK_MARKS,
    "deepseek-fenced": _DEEPSEEK_MARKS,
    "nemotron": ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"],
}  # fmt: skip
SPECIAL["glm-dense"] = SPECIAL["glm"]
# tokens of their own that are shown as text
PLAIN = {
    "qwen-xml": ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"],
    "glm": [f"<{slash}{tag}>" for tag in _GLM_TAGS for slash in ("", "/")],
}
PLAIN["glm-dense"] = PLAIN["glm"]
