"""The `Modelfile` of a GGUF file: what Ollama needs to prompt a model as it was trained.

Ollama renders Go templates, not Jinja. Where a chat template writes each turn between texts of its own, its rendering of a few
conversations shows these texts; the Go template made of them counts only if it renders other conversations alike. Anything
else is left out, and the file says so: a guess would prompt the model in a way it was never trained.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmrecipe.core.errors import DataError
from llmrecipe.data.formats.bad_row import BadRow
from llmrecipe.data.tokenize.chat_templates import Template, is_prompted_raw, template_of, turn_end_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODELFILE = "Modelfile"
LONGEST = 8192
"""Largest context that is set; memory grows with it, and the model may read more."""
ROLES = ("system", "user", "assistant")
WORDS = {"system": "Skalte", "user": "Umbron", "assistant": "Antrel"}
"""Contents that occur in no template."""
SECOND = {"user": "Ulmvik", "assistant": "Ardwen"}
UNWRITABLE = ("{{", "}}", '"""')
"""What cannot stand in the text of a Go template inside a Modelfile."""


@dataclass(frozen=True)
class TurnTexts:
    """A chat format in which every turn stands between fixed texts."""

    first: str
    """Before the first turn."""
    around: dict[str, tuple[str, str]]
    """Role -> what stands before and after its content."""
    header: str
    """Begins the answer."""
    system: str | None = None
    """What the system says where a conversation has no such turn."""

    def render(self, conversation: Sequence[tuple[str, str]]) -> str:
        """Render (role, content) pairs as the Go template does."""
        turns = list(conversation)
        if self.system is not None and turns[0][0] != "system":
            turns.insert(0, ("system", self.system))
        return self.first + "".join(self.around[role][0] + text + self.around[role][1] for role, text in turns) + self.header

    def go(self, leave_out: str) -> str:
        """Return the Go template.

        Args:
            leave_out: a text at the start that the tokenizer puts there.
        """
        branches = "".join(
            f'{{{{ {"else " if place else ""}if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}'
            for place, (role, (before, after)) in enumerate(self.around.items())
        )
        return f"{self.first.removeprefix(leave_out)}{{{{ range .Messages }}}}{branches}{{{{ end }}}}{{{{ end }}}}{self.header}"


CONVERSATIONS = (
    (("user", "What is it?"),),
    (("user", "Is it 12?"), ("assistant", "It is."), ("user", "Why?")),
    (("system", "Be brief."), ("user", "What is it?")),
    (("system", "Be brief."), ("user", "One."), ("assistant", "Two."), ("user", "Three."), ("assistant", "4."), ("user", "5?")),
)
"""What a Go template must render as the Jinja template does."""


def turns_of(template: Template) -> TurnTexts | None:
    """Return the texts around the turns of a chat template; None where they are not fixed."""
    try:
        turns = _read(template)
        if turns is None:
            return None
        known = [c for c in CONVERSATIONS if "system" in turns.around or c[0][0] != "system"]
        alike = all(turns.render(c) == _rendered(template, c) for c in known)
    except (BadRow, DataError, ValueError):
        return None
    texts = [turns.first, turns.header, turns.system or "", *(text for pair in turns.around.values() for text in pair)]
    return turns if alike and not any(bad in text for bad in UNWRITABLE for text in texts) else None


def _rendered(template: Template, conversation: Sequence[tuple[str, str]], prompt: bool = True) -> str:
    return template.render([{"role": role, "content": text} for role, text in conversation], prompt=prompt)


def _read(template: Template) -> TurnTexts | None:
    """Read the texts around the turns off a conversation in which every role speaks, and one without a system."""
    dialogue = [("user", WORDS["user"]), ("assistant", WORDS["assistant"]), *SECOND.items()]
    bare = _between(_rendered(template, dialogue, prompt=False), [text for _, text in dialogue])
    header = _rendered(template, dialogue[:3]).removeprefix(_rendered(template, dialogue[:3], prompt=False))
    # Between the contents of user, assistant, user and assistant stands the end of one turn with the start of the next.
    start, to_answer, to_question, again, end = bare
    if to_answer != again or not to_answer.endswith(header) or not to_question.startswith(end):
        return None
    user = to_question.removeprefix(end), to_answer.removesuffix(header)
    around = {"user": user, "assistant": (header, end)}
    if not start.endswith(user[0]):
        return None
    first, system = start.removesuffix(user[0]), None
    try:
        with_system = _between(
            _rendered(template, [("system", WORDS["system"]), *dialogue], prompt=False),
            [WORDS["system"], *(text for _, text in dialogue)],
        )
    except BadRow:
        return TurnTexts(first, around, header)
    opening, closing = with_system[0], with_system[1].removesuffix(user[0])
    if first.startswith(opening) and first.endswith(closing) and len(first) >= len(opening) + len(closing) and opening:
        # The template has words of its own for a conversation without a system: they stand where the system's would.
        system = first[len(opening) : len(first) - len(closing)]
    shared = _shared_start(opening, template) if system is not None or not opening.startswith(first) else first
    around = {"system": (opening.removeprefix(shared), closing), **around}
    return TurnTexts(shared, around, header, system or None)


def _shared_start(opening: str, template: Template) -> str:
    """Return the first token at the start of a conversation, which belongs to no turn."""
    bos = str(template.variables.get("bos_token") or "")
    return bos if bos and opening.startswith(bos) else ""


def _between(text: str, words: Sequence[str]) -> list[str]:
    """Return what stands before, between and after words that occur once each, in this order.

    Raises:
        ValueError: they do not.
    """
    parts = re.split("|".join(map(re.escape, words)), text)
    if len(parts) != len(words) + 1 or [text.find(word) for word in words] != sorted(text.find(word) for word in words):
        raise ValueError(text)
    return parts


def modelfile(
    file: str, tokenizer: PreTrainedTokenizerBase, positions: int, bos_added: bool, lead: str
) -> tuple[str, list[str]]:
    """Return a Modelfile for a GGUF file next to it, and notes.

    Args:
        positions: the most tokens the model reads.
        bos_added: the tokenizer puts its first token before a text by itself.
        lead: what a conversation begins with, before its template.
    """
    lines, notes = [f"FROM ./{file}"], []
    template = template_of(tokenizer)
    if template is None or is_prompted_raw(tokenizer):
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    elif (turns := turns_of(template)) is not None:
        leave_out = str(tokenizer.bos_token or "") if bos_added else ""
        lines.append(f'TEMPLATE """{lead}{turns.go(leave_out)}"""')
        if turns.system is not None:
            lines.append(f'SYSTEM """{turns.system}"""')
    else:
        note = "its chat template is no sequence of turns between fixed texts, so the Modelfile has no TEMPLATE"
        notes.append(f"{note}; llama.cpp reads the template in the file itself (llama-server --jinja)")
        lines.append(f"# {note}: write one, or serve the file with llama.cpp.")
    ends = [text for number in turn_end_tokens(tokenizer) if (text := tokenizer.convert_ids_to_tokens(number))]
    lines += [f'PARAMETER stop "{text}"' for text in ends if '"' not in text]
    if positions > LONGEST:
        lines.append(f"# The model reads up to {positions} tokens; a longer context takes more memory.")
    lines.append(f"PARAMETER num_ctx {min(positions, LONGEST)}")
    return "\n".join(lines) + "\n", notes
