"""Identity of a run: fingerprints of everything it is trained on and with, kept in `identity.json` and in every checkpoint.

    {"run": "3f2a…", "data": {"train": …, "validation": …, "test": …}, "base": {"model.safetensors": sha256, …},
     "files": {"reward/model.safetensors": sha256, …}, "tokenizer": …, "template": …}

A resume compares them and stops where anything differs. The base is hashed by a background thread while it is loaded: the first
step never waits for it, a checkpoint does.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrecipe.core.background import Background
from llmrecipe.core.errors import UserError
from llmrecipe.core.file_hashes import FileHash, file_hash
from llmrecipe.data.tokenize.call_tokenizer import call_tokenizer
from llmrecipe.models.checkpoint_path import STACK_FILE, run_folder
from llmrecipe.recipe.provenance import leaves
from llmrecipe.recipe.schema import ModelSection
from llmrecipe.runs import open_model
from llmrecipe.runs.base_files import base_folder, weight_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


PROBES = (
    "The 3 quick brown foxes' 1,024 jumps (over 0.5 lazy dogs) cost $12.75!\n\n\tdef f(x):\n\t    return x ** 2  # naïve café",
    "Überraschung; Žluťoučký kůň, съешь ещё этих булок, 我能吞下玻璃, こんにちは, مرحبا, नमस्ते, 🙂👩‍🚀 \u200bZWJ \ufeffBOM",
    "internationalization antidisestablishmentarianism aaaaaaaa   bbbb      c\r\n<s></s><|im_start|>[INST]",
)
"""Texts whose tokens tell tokenizers of one vocabulary apart."""
WORDS = {
    "data": "the data of the {} split",
    "base": "the base model's {}",
    "files": "the file {}",
    "tokenizer": "the tokenizer",
    "template": "the chat template",
}
"""Group of fingerprints -> what a message calls one of them."""


class Identity:
    """What a run is made of; hashes of files that are there are computed by background threads from now on.

    Args:
        run: the run's own name.
        splits: split -> the content hashes of its sources, or None; called later.
        section: of the model.
        named: the parts of the recipe that may name further files, such as a reward model's.
    """

    def __init__(
        self,
        run: str,
        splits: Mapping[str, Callable[[], list[str] | None]],
        section: ModelSection,
        named: Mapping[str, Any],
    ):
        self.run = run
        self.tokenizer: Any = None
        """With its chat template; set when it is loaded."""
        self._facts: dict[str, Any] = {}
        self._data = Background(lambda: data_facts(splits))
        self._files = Background(lambda: named_files(named))
        # The files of a hub model are known once it is loaded; their names in the cache are their hashes.
        is_there = folder_of(section) is not None
        base = Background(lambda: base_hashes(section)) if is_there else None
        self._base = lambda: base_hashes(section) if base is None else base.value(f"{section.path}: hashing the weights")

    def facts(self) -> dict[str, Any]:
        """Wait for the hashes and return everything."""
        if not self._facts:
            files = {"base": self._base(), "files": self._files.value("hashing the files of the recipe")}
            known = {part: {name: found.remember() for name, found in hashes.items()} for part, hashes in files.items()}
            self._facts = {
                "run": self.run,
                "data": self._data.value("hashing the data"),
                **known,
                **tokenizer_facts(self.tokenizer),
            }
        return self._facts


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return in words what differs; a fingerprint that one of the two does not have is no difference.

    Examples:
        >>> changed({"base": {"config.json": "a"}, "tokenizer": "x"}, {"base": {"config.json": "b"}, "tokenizer": "x"})
        ["the base model's config.json has other content"]
    """
    found = []
    for group, words in WORDS.items():
        old, new = before.get(group), now.get(group)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            for name in sorted({*old, *new}):
                if old.get(name) != new.get(name) and not (group == "data" and None in (old.get(name), new.get(name))):
                    how = "is gone" if name not in new else "is new" if name not in old else "has other content"
                    found.append(f"{words.format(name)} {how}")
        elif None not in (old, new) and old != new:
            found.append(f"{words} is another one")
    return found


def tokenizer_facts(tokenizer: PreTrainedTokenizerBase) -> dict[str, str | None]:
    """Return hashes of what a tokenizer does and of its chat template; they do not depend on the library's file format."""
    calls = [(text, special) for text in PROBES for special in (False, True)]
    ids = [call_tokenizer(tokenizer, text, add_special_tokens=special)["input_ids"] for text, special in calls]
    words = [sorted(tokenizer.get_vocab().items()), {k: str(v) for k, v in tokenizer.special_tokens_map.items()}, ids]
    template = [tokenizer.chat_template, getattr(tokenizer, "init_kwargs", {}).get("llmrecipe_template")]
    return {"tokenizer": _hash(words), "template": _hash(template)}


def data_facts(splits: Mapping[str, Callable[[], list[str] | None]]) -> dict[str, str | None]:
    """Return one hash of each split's sources.

    Args:
        splits: split -> the content hash of each of its sources; None where it has none.
    """
    return {name: None if (parts := sources()) is None else _hash(parts) for name, sources in splits.items()}


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True, default=str).encode()).hexdigest()


def base_hashes(section: ModelSection) -> dict[str, FileHash]:
    """Return the hash of every file the base and what is mounted on it are loaded from, by name."""
    return {name: file_hash(path) for name, path in sorted(base_files(section).items())}


def base_files(section: ModelSection) -> dict[str, Path]:
    """Return the files that a model section loads: config and weights of the base, the stacks of earlier runs, adapters."""
    base, saved, folder = open_model.resolve_section(section, tensors=False)
    place = folder_of(section)
    found = {}
    if place is not None:
        names = ["config.json", *(weight_files(place) if base.init == "pretrained" else ())]
        found = {name: place / name for name in names if (place / name).is_file()}
    if saved is not None and folder is not None:
        found |= {f"run/{name}": folder / name for name in (STACK_FILE, *(layer.file for layer in saved.layers))}
    for number, path in enumerate(base.adapters):
        found |= {f"adapter {number}/{p.name}": p for p in Path(path).glob("*") if p.suffix in (".json", ".safetensors")}
    return found


def folder_of(section: ModelSection) -> Path | None:
    """Return the folder that the base of a section is read from; None where there is none."""
    return base_folder(open_model.resolve_section(section, tensors=False)[0])


def named_files(mapping: Mapping[str, Any]) -> dict[str, FileHash]:
    """Return the hash of the local files, models and finished runs that parts of a recipe name, by their last two names."""
    found: dict[str, Path] = {}
    for _, value in leaves(mapping):
        for text in value if isinstance(value, list) else [value]:
            if not isinstance(text, str) or not text or len(text) > 1024:
                continue
            with contextlib.suppress(UserError, OSError, ValueError, RuntimeError):
                path = Path(text).expanduser()
                if path.is_file():
                    found["/".join(path.absolute().parts[-2:])] = path
                elif path.is_dir() and (run_folder(text) or (path / "config.json").is_file()):
                    files = base_files(ModelSection(path=text))
                    found |= {f"{path.absolute().name}/{name}": file for name, file in files.items()}
    return {name: file_hash(path) for name, path in sorted(found.items())}
