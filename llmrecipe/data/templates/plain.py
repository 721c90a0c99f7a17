"""Chat template: plain."""

from __future__ import annotations

from typing import ClassVar

from llmrecipe.core.registry import register
from llmrecipe.data.tokenize.chat_templates import BOS, CALLS, THOUGHT, ChatTemplate

PLAIN = (
    BOS + "{% if tools %}{{ 'Tools:\\n' }}{{ tools | tojson }}{{ '\\n' }}{% endif %}"
    "{% for message in messages %}{{ message['role'].capitalize() + ':\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}" + THOUGHT + "{{ message['content'] }}" + CALLS + "{{ eos_token }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ message['content'] + '\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:\\n' }}{% endif %}"
)


@register
class Plain(ChatTemplate):
    """Role names on lines of their own; answers end with the tokenizer's own end token, so no token has to be added."""

    text: ClassVar[str] = PLAIN
