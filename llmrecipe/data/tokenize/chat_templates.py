"""Chat templates: which one is used, and rendering with it.

A template comes from the tokenizer itself, from a name below, from a file, or as Jinja text in the recipe
(`tokenizer.chat_template`). Naming one (`own` is the tokenizer's) also wraps prompts and answers that are given as text, those
of Alpaca rows too, into messages; without it they stay raw text. The choice is stored in the tokenizer, so the saved folder
serves the template that was trained.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic.dataclasses import dataclass as pydantic_dataclass

from llmrecipe.core import registry
from llmrecipe.core.errors import DataError, did_you_mean
from llmrecipe.core.foreign import DuplicateKey, parse_json, reading, reason_of
from llmrecipe.core.registry import CONFIG
from llmrecipe.core.time_limit import BoundError, bounded
from llmrecipe.data.formats.bad_row import BadRow
from llmrecipe.data.formats.messages import THOUGHTS
from llmrecipe.data.tokenize.call_tokenizer import added_tokens, call_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tools = list[Any] | None
"""The tools a conversation may call, in the JSON that templates read."""
Variables = Mapping[str, Any] | None
"""Further variables of a template."""
Talk = tuple[list[dict[str, Any]], Tools, Variables]
"""A conversation with its tools and its further variables."""
Rendered = tuple[str, list[tuple[int, int]]]
"""A text, and the character spans in it that the assistant generated."""
TOGETHER = 64
"""Conversations rendered under one time limit: to set it takes longer than most renderings."""
ALPACA_PROMPT_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
"""The two prompt forms of Stanford Alpaca (tatsu-lab/stanford_alpaca, Apache-2.0), which its models expect word for word."""

BOS = "{{ bos_token }}"
CALLS = (
    "{% for call in message.tool_calls or [] %}{% set told = call.function or call %}"
    '{{ \'\\n<tool_call>\\n{"name": "\' + told.name + \'", "arguments": \' }}'
    "{{ told.arguments if told.arguments is string else told.arguments | tojson }}{{ '}\\n</tool_call>' }}{% endfor %}"
)
"""Tool calls as JSON between tags, as in Hermes and Qwen models."""
THOUGHT = (
    "{% set thought = message.reasoning_content or message.thinking or message.reasoning %}"
    "{% if thought %}{{ '<think>\\n' + thought + '\\n</think>\\n\\n' }}{% endif %}"
)
"""What was thought before the answer between tags, as in Qwen and DeepSeek models."""
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
KEY = "llmrecipe_template"
"""Key of the tokenizer's configuration that stores the name of a template."""
PROBE = [{"role": "user", "content": "x"}]


@pydantic_dataclass(config=CONFIG, kw_only=True)
class ChatTemplate:
    """A chat template by name. It marks the assistant's text with `{% generation %}` and ends each answer with a stop token."""

    group: ClassVar[str] = "chat_template"
    text: ClassVar[str]
    """Jinja text; a leading `{{ bos_token }}` is left out where the tokenizer gives raw text no BOS either."""
    tokens: ClassVar[tuple[str, ...]] = ()
    """Texts that must each be one token of the tokenizer, such as `<|im_end|>`."""


@dataclass(frozen=True)
class Template:
    """A chat template in use."""

    name: str
    """`own`, a built-in name, a file name, or `text`; shown to the user."""
    text: str
    named: bool
    """The recipe named it, so plain strings are wrapped into messages."""
    variables: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """Special tokens a template may print."""

    @property
    def marks(self) -> bool:
        """Return whether the template marks generated text with `{% generation %}`."""
        return bool(GENERATION.search(self.text))

    def render(
        self,
        messages: list[dict[str, Any]],
        prompt: bool = False,
        tools: Tools = None,
        kwargs: Variables = None,
    ) -> str:
        """Render a conversation as text; `prompt` ends it with the header of the assistant's turn.

        Raises:
            BadRow: the template refuses the conversation.
        """
        return self._run(messages, prompt, tools, kwargs, marked=False)[0]

    def render_marked(
        self, messages: list[dict[str, Any]], tools: Tools = None, kwargs: Variables = None
    ) -> tuple[str, list[tuple[int, int]]]:
        """Render a conversation as text, and return it with the character spans the assistant generated."""
        return self._run(messages, False, tools, kwargs, marked=True)

    def render_all(self, talks: Sequence[Talk], prompt: bool = False, marked: bool = False) -> list[Rendered | BadRow]:
        """Render conversations like `render`, or with `marked` like `render_marked`: in place of one it refuses, why.

        Those without tools and variables of their own share a time limit, `TOGETHER` at a time; where it ends or one of them
        is refused, each is rendered by itself.
        """
        found: dict[int, Rendered | BadRow] = {}
        plain: list[tuple[int, list[dict[str, Any]]]] = []
        for place, (messages, tools, kwargs) in enumerate(talks):
            if not tools and not kwargs and not any(m.get("tool_calls") for m in messages):
                plain.append((place, self._bare(messages)))
        for start in range(0, len(plain), TOGETHER):
            part = plain[start : start + TOGETHER]
            with contextlib.suppress(BadRow, DataError):
                texts = self._render([messages for _, messages in part], prompt, None, None, marked)
                found |= {place: text for (place, _), text in zip(part, texts, strict=True)}
        for place, (messages, tools, kwargs) in enumerate(talks):
            if place not in found:
                try:
                    found[place] = self._run(messages, prompt, tools, kwargs, marked)
                except BadRow as bad:
                    found[place] = bad
        return [found[place] for place in range(len(talks))]

    def _bare(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return _named_thoughts([{k: v for k, v in m.items() if v is not None} for m in messages], self.text)

    def _run(self, messages: list[dict[str, Any]], prompt: bool, tools: Tools, kwargs: Variables, marked: bool) -> Rendered:
        """Render with the arguments of tool calls as objects; as JSON text where the template joins or prints them."""
        bare = self._bare(messages)
        reported, arguments = _with_arguments(bare, as_text=False)
        try:
            found = self._render([reported], prompt, tools, kwargs, marked)[0]
        except BadRow:
            if not arguments:
                raise
        else:
            if not any(given and repr(given) in found[0] for given in arguments):
                return found
        return self._render([_with_arguments(bare, as_text=True)[0]], prompt, tools, kwargs, marked)[0]

    def _render(
        self, talks: list[list[dict[str, Any]]], prompt: bool, tools: Tools, kwargs: Variables, marked: bool
    ) -> list[Rendered]:
        from jinja2 import TemplateSyntaxError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            with bounded():
                found: Any = render_jinja_template(
                    conversations=talks,
                    tools=tools,
                    chat_template=self.text,
                    return_assistant_tokens_mask=marked,
                    add_generation_prompt=prompt,
                    **{**self.variables, **(kwargs or {})},
                )
        except TemplateSyntaxError as error:
            raise DataError(
                f"tokenizer.chat_template ({self.name}), line {error.lineno}: not a Jinja template: {reason_of(error)}"
            ) from error
        except BoundError as error:
            raise DataError(f"tokenizer.chat_template ({self.name}): {error} to render one conversation") from error
        except Exception as error:  # a template runs code of its own, which may raise anything
            raise BadRow("the chat template refuses the conversation", reason_of(error)) from error
        texts, spans = found
        places = [[(start, end) for start, end in of_one] for of_one in spans] if marked else [[] for _ in texts]
        return list(zip(texts, places, strict=True))


def _named_thoughts(messages: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """Return the messages with their thoughts under the name that a template reads; unchanged where it reads none."""
    if not any(name in message for message in messages for name in THOUGHTS):
        return messages
    read = [name for name in THOUGHTS if re.search(rf"[.'\"]{name}\b", text)]

    def named(message: dict[str, Any]) -> dict[str, Any]:
        other = next((name for name in THOUGHTS if name in message), None)
        if other is None or not read or any(name in message for name in read):
            return message
        return {**{k: v for k, v in message.items() if k != other}, read[0]: message[other]}

    return [named(message) for message in messages]


def _with_arguments(messages: list[dict[str, Any]], as_text: bool) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the messages with the arguments of all tool calls as objects, or as JSON text; and these arguments."""
    found: list[dict[str, Any]] = []

    def call_of(call: object) -> object:
        if not isinstance(call, dict):
            return call
        if isinstance(call.get("function"), dict):
            return {**call, "function": call_of(call["function"])}
        given = call.get("arguments")
        if isinstance(given, str):
            try:
                given = parse_json(given, unique=True)
            except DuplicateKey as error:
                raise BadRow("the arguments of a tool call repeat a key", str(error)) from error
            except ValueError:
                return call
        if not isinstance(given, dict):
            return call
        found.append(given)
        return {**call, "arguments": json.dumps(given, ensure_ascii=False) if as_text else given}

    reported = [
        {**m, "tool_calls": [call_of(call) for call in m["tool_calls"]]} if isinstance(m.get("tool_calls"), list) else m
        for m in messages
    ]
    return reported, found


def template_of(tokenizer: PreTrainedTokenizerBase) -> Template | None:
    """Return the template of a tokenizer, or None."""
    text = getattr(tokenizer, "chat_template", None)
    name = getattr(tokenizer, "init_kwargs", {}).get(KEY)
    if isinstance(text, dict):
        text = text.get("own" if name == "raw" else "default")
    if not text:
        return None
    name = None if name == "raw" else name
    return Template(name or "own", text, named=name is not None, variables=dict(tokenizer.special_tokens_map))


def set_template(tokenizer: PreTrainedTokenizerBase, value: str | None) -> Template | None:
    """Set the tokenizer's template to the one a recipe names (`tokenizer.chat_template`); None leaves it unchanged.

    Args:
        value: `own`, a built-in name, a path to a Jinja file, or the Jinja text itself.

    Raises:
        DataError: nothing of that name, or a tokenizer that lacks the tokens a built-in template needs.
    """
    if value is None:
        return template_of(tokenizer)
    if value == "own":
        if not getattr(tokenizer, "chat_template", None):
            names = ", ".join(registry.names("chat_template"))
            raise DataError(f"tokenizer.chat_template: this tokenizer has no template of its own; use one of {names}")
        name = "own"
        kept, used = tokenizer.chat_template, template_of(tokenizer)
        if isinstance(kept, dict) and "own" in kept:
            tokenizer.chat_template = kept["own"]
        elif used is not None:
            tokenizer.chat_template = used.text
    elif value in registry.names("chat_template"):
        name, tokenizer.chat_template = value, _fit(tokenizer, value)
    elif "{" in value:
        name, tokenizer.chat_template = "text", value
    elif Path(value).is_file():
        with reading(f"tokenizer.chat_template: {value}", "give a text file in UTF-8", DataError):
            name, tokenizer.chat_template = Path(value).name, Path(value).read_text(encoding="utf-8")
    else:
        known = ["own", *registry.names("chat_template")]
        raise DataError(
            f"tokenizer.chat_template: '{value}' is no built-in template{did_you_mean(value, known)} "
            f"(known: {', '.join(known)}), no file, and no Jinja text"
        )
    tokenizer.init_kwargs[KEY] = name
    return template_of(tokenizer)


RAW = BOS + "{% for message in messages %}{{ message['content'] }}{% if not loop.last %}{{ '\\n' }}{% endif %}{% endfor %}"
"""The template of a model that was trained on raw text: the contents alone, so that servers prompt it as it was trained."""


def keep_trained_template(tokenizer: PreTrainedTokenizerBase, trained: str, formats: str) -> None:
    """Store in a tokenizer how the rows of a run were rendered, so that everything that prompts the run prompts it alike.

    Raw text replaces the template by `RAW` and keeps the tokenizer's own under that name, for later training on conversations.
    Rows in the form of Stanford Alpaca get the built-in template that writes it, and keep the other one likewise.

    Args:
        trained: `Report.template` of the training rows.
        formats: `Report.format` of them.
    """
    template = template_of(tokenizer)
    if not trained.startswith("none") or "+" in trained:
        if is_prompted_raw(tokenizer) and template is not None and trained:
            tokenizer.chat_template = template.text
            tokenizer.init_kwargs.pop(KEY, None)
        return
    if formats in ("alpaca", "unpaired_alpaca", "preference_alpaca") and tokenizer.eos_token is not None:
        written = set_template(tokenizer, "alpaca")
        if template is not None and written is not None:
            tokenizer.chat_template = {"default": written.text, "own": template.text}
    elif template is not None and formats != "tokens":
        tokenizer.chat_template = {"default": raw_template(tokenizer), "own": template.text}
        tokenizer.init_kwargs[KEY] = "raw"


def is_prompted_raw(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether prompts of this tokenizer's model are raw text: it has no template, or was trained without it."""
    return not tokenizer.chat_template or getattr(tokenizer, "init_kwargs", {}).get(KEY) == "raw"


def _fit(tokenizer: PreTrainedTokenizerBase, name: str) -> str:
    """Return a built-in template for this tokenizer: with BOS only where raw text gets one too."""
    template: type[ChatTemplate] = registry.load_class("chat_template", name, "tokenizer.chat_template")
    text = template.text
    pieces = {token: call_tokenizer(tokenizer, token, add_special_tokens=False)["input_ids"] for token in template.tokens}
    unknown = [token for token, ids in pieces.items() if len(ids) != 1]
    if unknown:
        raise DataError(
            f"tokenizer.chat_template={name}: {' and '.join(unknown)} is not one token of this tokenizer, so no answer "
            "could end with it; set tokenizer.add_tokens=['<|im_start|>','<|im_end|>'] or use tokenizer.chat_template=plain"
        )
    if "eos_token" in text and tokenizer.eos_token is None:
        raise DataError(f"tokenizer.chat_template={name}: the tokenizer has no end token to close answers with")
    adds, _ = added_tokens(tokenizer)
    return text if adds else text.removeprefix(BOS)


def turn_end_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end an answer: the tokenizer's end token, and the one its template puts after an assistant turn.

    Generation has to stop at any of them.
    """
    found = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    template = template_of(tokenizer)
    if template is not None:
        turn = {"role": "assistant", "content": "x"}
        try:
            text = template.render([*PROBE, turn])
        except BadRow:
            return found
        special = set(special_ids(tokenizer))
        ids = call_tokenizer(tokenizer, text[text.rfind("x") + 1 :], add_special_tokens=False)["input_ids"]
        found += [i for i in ids if i in special][:1]
    return list(dict.fromkeys(found))


def special_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of every named or added token: text never merges across these."""
    return sorted({*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})})


def served_template(tokenizer: PreTrainedTokenizerBase) -> Template | None:
    """Return the template that prompts of a tokenizer's model are rendered by; None for raw text."""
    given: Any = tokenizer.chat_template
    served: Any = given.get("default") if isinstance(given, dict) else given
    return Template("served", served, named=True, variables=dict(tokenizer.special_tokens_map)) if served else None


def raw_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the template that writes raw text: `RAW`, with BOS only where the tokenizer puts it before raw text."""
    return RAW if added_tokens(tokenizer)[0] else RAW.removeprefix(BOS)


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Mapping[str, Any]], tools: Tools = None, kwargs: Variables = None
) -> list[int]:
    """Return the token ids of a conversation up to the next answer; plain text where the tokenizer has no template.

    Args:
        tools: the tools it may call, and `kwargs` further variables of the template.

    Raises:
        DataError: the template refuses the conversation.
    """
    template = served_template(tokenizer)
    if template is None:
        return list(call_tokenizer(tokenizer, "\n".join(t["content"] for t in turns))["input_ids"])
    try:
        text = template.render([dict(turn) for turn in turns], True, tools, kwargs)
    except BadRow as bad:
        raise DataError(f"{bad.reason}: {bad.detail}") from bad
    return list(call_tokenizer(tokenizer, text, add_special_tokens=False)["input_ids"])
