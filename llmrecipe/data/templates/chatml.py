"""Chat template: chatml."""

from __future__ import annotations

from typing import ClassVar

from llmrecipe.core.registry import register
from llmrecipe.data.tokenize.chat_templates import BOS, CALLS, THOUGHT, ChatTemplate

CHATML = (
    BOS + "{% if tools %}{{ '<|im_start|>system\\nTools:\\n' }}{{ tools | tojson }}{{ '<|im_end|>\\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}" + THOUGHT + "{{ message['content'] }}" + CALLS + "{{ '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@register
class Chatml(ChatTemplate):
    """ChatML: turns between <|im_start|> and <|im_end|>, tools in a system turn, tool calls as JSON between tags."""

    text: ClassVar[str] = CHATML
    tokens: ClassVar[tuple[str, ...]] = ("<|im_start|>", "<|im_end|>")
