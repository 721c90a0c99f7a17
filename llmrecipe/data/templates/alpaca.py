"""Chat template: alpaca."""

from __future__ import annotations

from typing import ClassVar

from llmrecipe.core.registry import register
from llmrecipe.data.tokenize.chat_templates import ALPACA_PROMPT, ALPACA_PROMPT_INPUT, BOS, CALLS, THOUGHT, ChatTemplate

_INSTRUCTION = (
    "{{ '"
    + ALPACA_PROMPT_INPUT.replace("\n", "\\n")
    .replace("{instruction}", "' + message.instruction + '")
    .replace("{input}", "' + message.input + '")
    .replace("### Response:\\n", "")
    + "' }}"
)
_PLAIN_INSTRUCTION = (
    "{{ '"
    + ALPACA_PROMPT.replace("\n", "\\n").replace("{instruction}", "' + instruction + '").replace("### Response:\\n", "")
    + "' }}"
)
ALPACA = (
    BOS + "{% if tools %}{{ 'Tools:\\n' }}{{ tools | tojson }}{{ '\\n\\n' }}{% endif %}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '### Response:\\n' }}{% generation %}" + THOUGHT + "{{ message['content'] }}" + CALLS + "{{ eos_token }}"
    "{% endgeneration %}{{ '\\n\\n' }}"
    "{% elif message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% else %}{% set instruction = message.instruction or message['content'] %}"
    "{% if message.input %}" + _INSTRUCTION + "{% else %}" + _PLAIN_INSTRUCTION + "{% endif %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
)


@register
class Alpaca(ChatTemplate):
    """Stanford Alpaca: instruction, input and response under headings; answers end with the tokenizer's own end token."""

    text: ClassVar[str] = ALPACA
