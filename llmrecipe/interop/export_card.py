"""The model card of an exported folder: the card of its run, for readers who have the folder and not the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from llmrecipe.core.errors import UserError
from llmrecipe.core.foreign import read_json
from llmrecipe.core.redact import redact_text
from llmrecipe.interop.export_options import GGUF_FILE, TOKENIZER_FILE, ExportOptions
from llmrecipe.models.checkpoint_path import HUB_NAME, run_folder
from llmrecipe.runs.model_card import USE, base_licence, hub_id, place_name, read_card, with_front_matter

CARD = "README.md"
ADAPTER_CONFIG = "adapter_config.json"
BASE_KEYS = ("base_model_name_or_path", "model_name")
"""Keys under which PEFT and the adapters library name the base."""
LIBRARIES = {
    "merged": "transformers",
    "peft": "peft",
    "vllm-lora": "peft",
    "gguf": "gguf",
    "adapter_hub": "adapters",
    "sentence_transformers": "sentence-transformers",
}
"""Format -> the library the hub lists its folders under."""
RELATIONS = {"merged": "finetune", "gguf": "finetune", "sentence_transformers": "finetune"}
"""Format -> how the hub relates it to its base, where it is no adapter."""
SNIPPETS = {
    "merged": "from transformers import pipeline\n\npipe = pipeline({task!r}, model={here!r})",
    "peft": (
        "from peft import PeftModel\nfrom transformers import {auto}, AutoTokenizer\n\n"
        "base = {auto}.from_pretrained({base!r})\nmodel = PeftModel.from_pretrained(base, {here!r})\n"
        "tokenizer = AutoTokenizer.from_pretrained({here!r})"
    ),
    "gguf": (
        "# llama-server -m model.gguf --jinja, or: ollama create NAME -f Modelfile\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        "model = AutoModelForCausalLM.from_pretrained({here!r}, gguf_file='model.gguf')\n"
        "tokenizer = AutoTokenizer.from_pretrained({here!r}{reader})"
    ),
    "adapter_hub": (
        "from adapters import AutoAdapterModel\n\nmodel = AutoAdapterModel.from_pretrained({base!r})\n"
        "model.set_active_adapters(model.load_adapter({here!r}))"
    ),
    "sentence_transformers": (
        "from sentence_transformers import SentenceTransformer\n\nvectors = SentenceTransformer({here!r}).encode(['A text.'])"
    ),
}
"""Format -> how its folder is used; `here` is the folder, or its repository."""
SNIPPETS["vllm-lora"] = SNIPPETS["peft"]
AUTO = {
    "text-generation": "AutoModelForCausalLM",
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "image-classification": "AutoModelForImageClassification",
}
"""Task -> the class of Transformers that opens a base for it."""
HERE = "FOLDER"
"""What stands for the folder in a card until it has a repository."""


def check_hub_id(option: str, name: str) -> None:
    """Refuse what is no hub id.

    Raises:
        UserError: naming the option and the form.
    """
    try:
        validate_repo_id(name)
        fits = HUB_NAME.fullmatch(name) is not None
    except HFValidationError:
        fits = False
    if not fits:
        raise UserError(f"{option} {name}: a name on the hub is OWNER/NAME, of letters, digits, '-', '_' and '.'")


def named_base(folder: Path) -> str | None:
    """Return the base that an adapter folder names: a hub id or a path."""
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        return None
    config = read_json(path)
    return next((str(config[key]) for key in BASE_KEYS if config.get(key)), None)


def name_base(folder: Path, base: str | None) -> list[str]:
    """Name the base of an adapter folder by its hub id; return a note where only a folder is known.

    Args:
        base: the id; None keeps what stands there.
    """
    named = named_base(folder)
    if named is None:
        return []
    if base is None:
        where = "export with --base OWNER/NAME, or name it when the folder is pushed"
        return [] if hub_id(named) else [f"its base is named by a folder of this machine; for others {where}"]
    path = folder / ADAPTER_CONFIG
    path.write_text(json.dumps(with_base(read_json(path), base), indent=2) + "\n", encoding="utf-8")
    return []


def with_base(config: dict[str, Any], base: str) -> dict[str, Any]:
    """Return the configuration of an adapter with its base named by a hub id."""
    return {**config, **{key: base for key in BASE_KEYS if config.get(key)}}


def own_card(folder: Path | None, name: str) -> tuple[dict[str, Any], str]:
    """Return front matter and text of a folder's card; without a card there is a heading alone.

    Args:
        name: what the heading says then.
    """
    if folder is None or not (folder / CARD).is_file():
        return {}, f"# {name}\n\nExported by llmrecipe.\n\n"
    return read_card(folder / CARD)


def write_card(folder: Path, run: str, options: ExportOptions) -> None:
    """Write the card of an exported folder.

    The scores of a run are not those of a combination with others, so a combined export has none.
    """
    known, text = own_card(run_folder(run), Path(run).name)
    base = options.base or known.get("base_model") or hub_id(named_base(folder) or "")
    data = {**known, "library_name": LIBRARIES[options.to]}
    if base is not None:
        data |= {"base_model": base, "base_model_relation": RELATIONS.get(options.to, "adapter")}
    if options.base is not None and "license" not in data and (licence := base_licence(options.base)):
        data["license"] = licence
    if options.add:
        parts = ", ".join(f"{place_name(path)} x {weight:g}" for path, weight in {run: options.weight, **options.add}.items())
        data.pop("model-index", None)
        text = f"# {Path(run).name} combined\n\nA combination made with llmrecipe ({options.merge.kind}): {parts}.\n\n"
    (folder / CARD).write_text(
        card_text(data, text, options.to, own_tokenizer=(folder / TOKENIZER_FILE).is_file()), encoding="utf-8"
    )


def card_text(data: dict[str, Any], body: str, to: str, here: str = HERE, own_tokenizer: bool = False) -> str:
    """Return a card with the lines that say how its folder is used.

    Args:
        data: front matter.
        body: the text; what stands behind `Use it:` is replaced.
        here: the folder or its repository.
        own_tokenizer: a tokenizer is saved next to a GGUF file, because Transformers reads the one inside in another way.
    """
    base, task = str(data.get("base_model") or "BASE"), str(data.get("pipeline_tag") or "text-generation")
    reader = "" if own_tokenizer else f", gguf_file={GGUF_FILE!r}"
    snippet = SNIPPETS[to].format(task=task, base=base, here=here, reader=reader, auto=AUTO.get(task, "AutoModel"))
    text = f"{body.partition(USE)[0].rstrip()}\n\n{USE}\n\n```python\n{snippet}\n```\n"
    return redact_text(with_front_matter(ModelCardData(**data, ignore_metadata_errors=True), text))
