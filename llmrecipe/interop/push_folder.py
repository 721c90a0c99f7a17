"""Pushing an exported folder to the Hugging Face hub: what goes, as it goes, and nothing else of this machine.

Private unless the user says otherwise. The token (`HF_TOKEN`, or that of a login) is read by the hub's library alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, get_token
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

from llmrecipe.core.errors import UserError
from llmrecipe.core.foreign import read_json
from llmrecipe.core.path_hints import near_path
from llmrecipe.interop.export_card import (
    ADAPTER_CONFIG,
    CARD,
    LIBRARIES,
    card_text,
    check_hub_id,
    named_base,
    own_card,
    with_base,
)
from llmrecipe.interop.export_options import FORMATS, GGUF_FILE, OPTIONS_FILE, TOKENIZER_FILE
from llmrecipe.interop.machine_paths import VOCABULARIES, machine_path
from llmrecipe.models.checkpoint_path import run_folder
from llmrecipe.models.resolve_class import first_line
from llmrecipe.runs.model_card import hub_id

LEFT_OUT = (OPTIONS_FILE, "checksums.json", "identity.json")
"""Files that only this machine can use: paths of runs, hashes of files here."""
OWN_PATHS = ("_name_or_path", "name_or_path")
"""Keys in which libraries note the folder something was read from."""
CLIENTS = ("httpx", "httpx2", "requests", "urllib3")


@dataclass(frozen=True)
class Upload:
    """What would be pushed."""

    repo: str
    private: bool
    files: Mapping[str, Path | bytes]
    """Path in the repository -> the file here, or its content where it goes out changed."""
    notes: list[str]

    def sizes(self) -> dict[str, int]:
        """Return the bytes of each file."""
        return {name: len(f) if isinstance(f, bytes) else f.stat().st_size for name, f in self.files.items()}

    def card(self) -> str:
        """Return the card as it goes out."""
        content = self.files[CARD]
        assert isinstance(content, bytes), "the card is written for its repository"
        return content.decode("utf-8")


def exported_folder(place: Path) -> Path:
    """Return the folder to push: an exported one, or the only one in a run directory.

    Raises:
        UserError: it is neither, or the run has none or several.
    """
    if not place.is_dir():
        raise UserError(f"push {place}: there is no such folder{near_path(place)}")
    if run_folder(str(place)) is None or (place / OPTIONS_FILE).is_file():
        if not any((place / name).is_file() for name in ("config.json", ADAPTER_CONFIG, "modules.json", GGUF_FILE)):
            raise UserError(f"push {place}: this is neither a run nor a folder that `llmrecipe export` wrote")
        return place
    found = [path for path in sorted(place.iterdir()) if (path / OPTIONS_FILE).is_file()]
    if not found:
        raise UserError(
            f"push {place}: a run is pushed as other libraries read it; export it first: llmrecipe export {place} --to peft "
            f"(or {', '.join(name for name in FORMATS if name != 'peft')})"
        )
    if len(found) > 1:
        raise UserError(f"push {place}: the run has several exports; name one: {', '.join(map(str, found))}")
    return found[0]


def prepare_upload(folder: Path, repo: str, private: bool, base: str | None, licence: str | None) -> Upload:
    """Return what would be pushed, without reaching the hub.

    Args:
        base: hub id of the base model; None where the folder knows it.
        licence: as the hub writes it (apache-2.0); None carries over that of the base, where it is known.

    Raises:
        UserError: a name that the hub does not take, an adapter whose base is a folder of this machine, or a file that names a
            place of this machine.
    """
    check_hub_id("--repo", repo)
    if base is not None:
        check_hub_id("--base", base)
    kind = _kind(folder)
    known, body = own_card(folder, repo.rpartition("/")[2])
    named = named_base(folder)
    base = base or hub_id(named or "") or known.get("base_model")
    if named is not None and base is None:
        raise UserError(
            f"push {folder}: the adapter names its base by a folder of this machine ({named}), which nobody else has; "
            "name it on the hub: --base OWNER/NAME"
        )
    data = {**known, "library_name": LIBRARIES[kind], **({"base_model": base} if base else {})}
    data |= {"license": licence} if licence else {}
    notes = [] if base else ["the card names no base model; say which it is with --base OWNER/NAME"]
    if not data.get("license"):
        notes.append("the card names no licence: that of the base is looked up on the hub; or say --license")
    files: dict[str, Path | bytes] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if name in LEFT_OUT or any(part.startswith((".", "__")) for part in path.relative_to(folder).parts):
            continue
        if not path.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"push {folder}: {name} is a link to {path.resolve()}, outside the folder; put a copy in its place")
        files[name] = _as_it_goes(path, name, base)
    files[CARD] = card_text(data, body, kind, here=repo, own_tokenizer=(folder / TOKENIZER_FILE).is_file()).encode("utf-8")
    for name, content in files.items():
        if (found := machine_path(content, name, folder)) is not None:
            raise UserError(f"push {folder}: {name} names a place of this machine ({found:.200}); take it out first")
    return Upload(repo, private, files, notes)


def _kind(folder: Path) -> str:
    """Return the format of an exported folder, by its files where it does not say it."""
    if (folder / OPTIONS_FILE).is_file():
        said = read_json(folder / OPTIONS_FILE).get("to")
        if said in FORMATS:
            return str(said)
    if (folder / ADAPTER_CONFIG).is_file():
        return "peft" if "peft_type" in read_json(folder / ADAPTER_CONFIG) else "adapter_hub"
    if (folder / GGUF_FILE).is_file():
        return "gguf"
    return "sentence_transformers" if (folder / "modules.json").is_file() else "merged"


def _as_it_goes(path: Path, name: str, base: str | None) -> Path | bytes:
    """Return a file; one of JSON with its base by hub id and without the folder a library read it from."""
    if path.suffix != ".json" or path.name in VOCABULARIES:
        return path
    content = read_json(path, kind=object)
    if not isinstance(content, dict):
        return path
    changed = _without_own_paths(content)
    if name == ADAPTER_CONFIG and base is not None:
        changed = with_base(changed, base)
    return path if changed == content else (json.dumps(changed, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


def _without_own_paths(value: Any) -> Any:  # noqa: ANN401 (any JSON value)
    """Return a configuration, also one inside another, without the folders that libraries note."""
    if isinstance(value, dict):
        return {k: _without_own_paths(v) for k, v in value.items() if not (k in OWN_PATHS and _is_here(v))}
    return [_without_own_paths(v) for v in value] if isinstance(value, list) else value


def _is_here(value: object) -> bool:
    return isinstance(value, str) and (Path(value).is_absolute() or value.startswith((".", "~")) or Path(value).exists())


def push(upload: Upload, message: str) -> str:
    """Create the repository where there is none, and commit the files; return its address.

    Raises:
        UserError: no login, no network, a refusal of the hub, or a public repository where a private one is meant.
    """
    if get_token() is None:
        raise UserError("push: no login on the hub; set HF_TOKEN in the environment, or run `hf auth login`")
    api = HfApi()
    try:
        try:
            there = api.model_info(upload.repo)
            if upload.private and not there.private:
                raise UserError(f"push: {upload.repo} exists and is public; add --public, or choose another name")
        except RepositoryNotFoundError:
            api.create_repo(upload.repo, private=upload.private)
        files = {**upload.files, CARD: _with_licence(upload, api)}
        operations = [CommitOperationAdd(name, str(f) if isinstance(f, Path) else f) for name, f in files.items()]
        done = api.create_commit(upload.repo, operations, commit_message=message)
    except OfflineModeIsEnabled as error:
        raise UserError("push: HF_HUB_OFFLINE is set; unset it to reach the hub") from error
    except HfHubHTTPError as error:
        raise UserError(f"push {upload.repo}: the hub refused it: {first_line(error)}") from error
    except Exception as error:  # versions of the hub's library have different clients, each with errors of its own
        if isinstance(error, OSError) or type(error).__module__.partition(".")[0] in CLIENTS:
            raise UserError(f"push {upload.repo}: the hub cannot be reached ({first_line(error)})") from error
        raise
    return str(done.repo_url)


def _with_licence(upload: Upload, api: HfApi) -> bytes:
    """Return the card, with the licence that the hub knows of the base where the card names none."""
    card = ModelCard(upload.card(), ignore_metadata_errors=True)
    base = card.data.get("base_model")
    if card.data.get("license") is None and isinstance(base, str):
        try:
            known = api.model_info(base).card_data
        except HfHubHTTPError:
            known = None
        for name in ("license", "license_name", "license_link"):
            if known is not None and isinstance(value := known.get(name), str):
                card.data[name] = value
    return str(card).encode("utf-8")
