"""The data sets of axolotl's files: places, formats, columns, chat template and what is trained."""

from __future__ import annotations

from typing import Any

from llmrecipe.interop.migrate.account import Account
from llmrecipe.interop.migrate.values import flag, text

FORMATS = {
    "alpaca": "alpaca",
    "chat_template": "auto",
    "chat_template.default": "auto",
    "completion": "text",
    "pretrain": "text",
    "sharegpt": "sharegpt",
}
"""`type` of a data set -> format here; types of preference rows are detected."""
COLUMNS = {
    "field": "text",
    "field_messages": "messages",
    "field_chosen": "chosen",
    "field_rejected": "rejected",
    "text_column": "text",
}
"""Key of a data set that names a column -> the column it stands for."""
PLAIN_PROMPT = "{instruction}"
"""Prompt format of a data set that adds nothing to the instruction."""
BUILT_IN = ("alpaca", "chatml")
NOTHING = ("roles", "message_field_role", "message_field_content", "message_property_mappings", "ds_type", "trust_remote_code")
"""Keys of a data set that say how messages are written, which is detected here."""


def read_datasets(account: Account, objective: str) -> None:
    """Enter the data sets, and how their rows become tokens."""
    group = "pretraining_dataset" if account.raw("pretraining_dataset") is not None else "datasets"
    given = account.raw(group)
    sets: list[Any] = given if isinstance(given, list) else []
    if isinstance(given, str):
        account.carry(group, "data.path", given)
    elif not sets:
        account.leave(group, "the file names no rows: set data.path=FILE")
    places = [_one(account, f"{group}[{index}]") for index, one in enumerate(sets) if isinstance(one, dict)]
    found = [place for place in places if place]
    if found:
        account.settings["data.path"] = found[0] if len(found) == 1 else list(dict.fromkeys(found))
    _format(account, group, len(sets), objective)
    for index in range(len(tests) if isinstance(tests := account.raw("test_datasets"), list) else 0):
        account.leave(f"test_datasets[{index}]", "set data.validation to the file of its rows")
    _template(account, [str(account.raw(f"{group}[{index}].type")) for index in range(len(sets))], objective)
    if objective == "sft":
        every = account.read("train_on_inputs", flag, False)
        account.carry("train_on_inputs", "objective.mask", "all" if every else "assistant")
    else:
        account.same("train_on_inputs", f"{objective} decides what is trained")
    packing = account.raw("sample_packing")
    if packing is not None:
        on = account.read("sample_packing", flag)
        note = "batch.size counts rows, packed or not; there it counted packs: multiply it by the rows of a pack" if on else ""
        account.carry("sample_packing", "data.packing", "on" if on else "off", note)


def _one(account: Account, at: str) -> str | None:
    """Enter one data set; return its place."""
    place = account.raw(f"{at}.path")
    name = account.raw(f"{at}.name")
    files = account.raw(f"{at}.data_files")
    split = account.raw(f"{at}.split")
    if files is not None and place is not None:
        account.leave(f"{at}.data_files", "files of a hub set: download them and name them in data.path")
    if place is None and files is not None:
        place = files[0] if isinstance(files, list) and len(files) == 1 else files
        account.explain(f"{at}.data_files", "data.path")
    if name is not None:
        account.explain(f"{at}.name", "the configuration of the hub set stands behind its name, NAME:CONFIG")
    if split == "train":
        account.same(f"{at}.split", "the training rows")
    elif split is not None:
        account.leave(f"{at}.split", "a part of a split: set data.limit=ROWS, or write these rows to a file")
    for key in NOTHING:
        account.same(f"{at}.{key}", "how messages are written is detected")
    for key, remedy in (
        ("roles_to_train", "objective.mask is assistant, last, completion or all"),
        ("train_on_eos", "the end of a trained answer is trained"),
        ("train_on_eot", "the end of a trained answer is trained"),
        ("field_thinking", "thoughts are a key `thinking` of a message; rename it in the file"),
        ("template_thinking_key", "thoughts are a key `thinking` of a message; rename it in the file"),
        ("shards", "set data.limit=ROWS"),
        ("drop_system_message", "take the system messages out of the file"),
        ("message_field_training", "weights of messages: the key `weight` of an assistant message"),
        ("message_field_training_detail", "weights of messages: the key `weight` of an assistant message"),
    ):
        value = account.raw(f"{at}.{key}")
        if value in ([], ["assistant"], ["gpt"], "turn", "all", False) and value is not None and key != "shards":
            account.same(f"{at}.{key}", "as here")
        elif value is not None:
            account.leave(f"{at}.{key}", remedy)
    if not isinstance(place, str):
        return None
    path = f"{place}:{name}" if name else text(place)
    account.explain(f"{at}.path", f"data.path: {path}")
    return path


def _format(account: Account, group: str, count: int, objective: str) -> None:
    """Set the format and the columns that all data sets share, and name where they differ."""
    formats: list[str] = []
    columns: list[dict[str, str]] = []
    for index in range(count):
        at = f"{group}[{index}]"
        kind = account.raw(f"{at}.type")
        if isinstance(kind, str):
            known = FORMATS.get(kind.split(":")[0])
            formats.append(known or "auto")
            if known is None and objective in ("sft", "clm"):
                account.leave(f"{at}.type", "the format is detected; look once: llmrecipe data recipe=..., or set data.columns")
            else:
                account.explain(f"{at}.type", f"data.format: {known or 'auto'}")
        columns.append(_columns(account, at) | (_own_format(account, f"{at}.type") if isinstance(kind, dict) else {}))
    if len(set(formats)) == 1:
        account.settings["data.format"] = formats[0]
    chosen = [one for one in columns if one]
    if chosen and all(one == columns[0] for one in columns):
        account.settings["data.columns"] = columns[0]
    elif chosen:
        account.leave(group, "the sets name their columns differently: set data.columns, or join the files")


def _own_format(account: Account, at: str) -> dict[str, str]:
    """Enter a prompt format of the file's own; return the columns of its instructions and answers.

    Nothing is lost where the prompt is the instruction alone; any other text around it is left.
    """
    fields = (("field_instruction", "prompt"), ("field_output", "completion"))
    found = {wanted: account.read(f"{at}.{key}", text) for key, wanted in fields if account.raw(f"{at}.{key}") is not None}
    for key, wanted in fields:
        if wanted in found:
            account.explain(f"{at}.{key}", f"data.columns: {wanted} <- {found[wanted]}")
    if account.raw(f"{at}.format") is None:
        account.leave(f"{at}.format", "axolotl has no default for it; compare the rows once: llmrecipe data recipe=...")
    for key in ("format", "no_input_format"):
        if account.raw(f"{at}.{key}") == PLAIN_PROMPT:
            account.same(f"{at}.{key}", "the prompt is the instruction alone")
        elif account.raw(f"{at}.{key}") is not None:
            account.leave(f"{at}.{key}", "write the whole prompt into the column of prompts")
    for key in ("system_prompt", "system_format", "field_system", "field_input"):
        if account.raw(f"{at}.{key}"):
            account.leave(f"{at}.{key}", "write the whole prompt into the column of prompts")
        else:
            account.same(f"{at}.{key}", "empty")
    return found


def _columns(account: Account, at: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for key, wanted in COLUMNS.items():
        name = account.raw(f"{at}.{key}")
        if name is None:
            continue
        if name in (wanted, "conversations", "messages"):
            account.same(f"{at}.{key}", "detected")
        else:
            found[wanted] = text(name)
            account.explain(f"{at}.{key}", f"data.columns: {wanted} <- {name}")
    return found


def _template(account: Account, types: list[str], objective: str) -> None:
    """Set the chat template: alpaca's for rows of that type, else the named one where it is built in, else the model's own."""
    name = account.raw("chat_template")
    if account.raw("chat_template_jinja") is not None:
        account.carry("chat_template_jinja", "tokenizer.chat_template", account.read("chat_template_jinja", text))
        account.same("chat_template", "chat_template_jinja takes its place")
    elif name in BUILT_IN:
        account.carry("chat_template", "tokenizer.chat_template", name, "compare its text once: llmrecipe data recipe=...")
    elif name is not None:
        note = "the template of the model's own tokenizer; compare it once: llmrecipe data recipe=..."
        account.carry("chat_template", "tokenizer.chat_template", "own", note)
    elif objective == "sft" and types and all(kind.startswith("alpaca") for kind in types):
        account.assume(
            "datasets[].type", "tokenizer.chat_template", "alpaca", "compare its text once: llmrecipe data recipe=..."
        )
