"""Loading a model for any purpose: a checkpoint, a hub name, the embedded model, or a run directory with its stacks."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrecipe.core.errors import ModelError
from llmrecipe.core.foreign import reading
from llmrecipe.methods._base.method import Wrapper
from llmrecipe.methods._engines.biases import finalize_biases
from llmrecipe.methods._engines.loftq_codes import finalize_codes
from llmrecipe.methods._engines.quantized import dequantize_model
from llmrecipe.methods.selective._engines.sparse_method import finalize_selections
from llmrecipe.models import image_processor, new_token_rows, stored_heads
from llmrecipe.models.checkpoint_path import STACK_FILE, adapter_base, find_base, is_adapter, run_folder
from llmrecipe.models.hooks.hook import DELTA, all_hooks, hook_kind
from llmrecipe.models.load import load_model, load_tokenizer
from llmrecipe.models.resolve_class import STATES, family_head
from llmrecipe.recipe.rights import without_rights
from llmrecipe.recipe.schema import ModelSection, ProcessorSection, TokenizerSection
from llmrecipe.runs import base_storage, delta
from llmrecipe.runs.adapter_format import read_adapter
from llmrecipe.runs.base_files import same_base
from llmrecipe.runs.checksums import verify

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from llmrecipe.models.image_processor import ImageProcessor
    from llmrecipe.models.pretrained import LanguageModel

logger = logging.getLogger("llmrecipe")


@dataclass
class LoadedModel:
    """A loaded model with what it was built from."""

    model: LanguageModel
    tokenizer: PreTrainedTokenizerBase
    section: ModelSection
    """The section that loaded the base weights."""
    layers: list[delta.Layer] = field(default_factory=list)
    """Saved stacks mounted on the base, oldest first."""
    mounted: list[Wrapper] = field(default_factory=list)
    merged: bool = False
    """Whether mounted stacks were folded into the weights, so that the base is no longer in memory."""
    quantized: list[str] = field(default_factory=list)
    """Kinds of the wrappers that quantized the base for the saved stacks."""
    base_fingerprint: str = ""
    head: str = "causal"
    labels: list[str] | None = None
    """Head and labels it was loaded with (see `load_model`)."""
    continued: delta.Layer | None = None
    """With `model.continue`: the run's own last layer, to be trained further rather than mounted."""
    processor: ImageProcessor | None = None
    """The image processor in the folder of the run; None where its rows have no pictures."""


def resolve_section(section: ModelSection, tensors: bool = True) -> tuple[ModelSection, delta.SavedStack | None, Path | None]:
    """Resolve a model section to (section of the base, saved stacks, folder that contains them).

    Rights in the section that a run has saved of its base are ignored: only those of the given section apply.

    Args:
        tensors: whether to read those of the saved stacks.
    """
    if is_adapter(section.path):
        adapters = {section.path: 1.0, **section.adapters}
        update = {"path": adapter_base(section.path), "adapters": adapters}
        return section.model_copy(update=update), None, Path(section.path)
    folder = run_folder(section.path)
    if folder is None:
        return section, None, None
    if (folder / "model" / "config.json").is_file():
        return section.model_copy(update={"path": str(folder / "model")}), None, folder
    saved = delta.read_stack(folder, tensors)
    own = section.model_dump(exclude_defaults=True, exclude={"path", "continue_"})
    with reading(f"{folder / STACK_FILE}: its model section"):
        base = ModelSection(**{**without_rights(saved.base["section"]), **own, "path": find_base(saved.base, folder)})
    return base, saved, folder


def open_model(
    section: ModelSection,
    tokenizer: TokenizerSection,
    *,
    head: str = "causal",
    labels: list[str] | None = None,
    own: Sequence[Wrapper] = (),
    seed: int = 0,
    options: dict[str, dict[str, Any]] | None = None,
    device: str = "cpu",
) -> LoadedModel:
    """Load a model and mount the stacks of the run it comes from.

    Args:
        device: kind of the device it will compute on, which decides what `model.dtype: auto` means.
        own: wrappers of a stack that is to be attached, of which those that quantize the base act while it is loaded.
        options: wrapper name -> options that may differ on a finished run (see `Wrapper.adjustable`).

    Raises:
        ModelError: the weights, the tokenizer or the fingerprint do not fit.
    """
    base, saved, folder = resolve_section(section)
    return open_saved(
        base, saved, folder, tokenizer,
        head=head, labels=labels, own=own, seed=seed, options=options, continue_=section.continue_, device=device,
    )  # fmt: skip


def open_saved(
    base: ModelSection,
    saved: delta.SavedStack | None,
    folder: Path | None,
    tokenizer: TokenizerSection,
    *,
    head: str = "causal",
    labels: list[str] | None = None,
    own: Sequence[Wrapper] = (),
    seed: int = 0,
    options: dict[str, dict[str, Any]] | None = None,
    continue_: bool = False,
    device: str = "cpu",
) -> LoadedModel:
    """Load base weights and mount saved stacks, then PEFT adapters, on them; see `open_model`."""
    if folder is not None:
        read = {STACK_FILE, *(layer.file for layer in saved.layers)} if saved is not None else set()
        verify(folder, lambda name: name not in read)
    known = base_storage.storages(saved.layers if saved is not None else [])
    wanted = base_storage.base_wrappers(own)
    kwargs = {name: value for wrapper in (known[0] if known else wanted) for name, value in wrapper.load_kwargs().items()}
    if saved is not None and saved.labels and not labels and saved.head == head:
        labels = saved.labels
    text = load_tokenizer(base, own_tokenizer(tokenizer, folder))
    model = load_model(base, rows_head=head, labels=labels, load_kwargs=kwargs, tokenizer=text, device=device, seed=seed)
    for index, wrappers in enumerate(known):
        if index:
            base_storage.convert(model, wrappers)
        else:
            for wrapper in wrappers:
                wrapper.attach(model)
    if saved is not None and folder is not None:
        check_saved_base(model, base, saved, folder, restored=bool(known) or not wanted)
    if known and wanted and not base_storage.alike(known[-1], wanted):
        base_storage.convert(model, wanted)
    loaded = LoadedModel(model, text, base.model_copy(update={"adapters": {}}), base_fingerprint=delta.fingerprint(model))
    if folder is not None:
        stored_heads.read_heads(model, folder)
        if (folder / image_processor.FILE).is_file():
            loaded.processor = image_processor.load_processor(base, ProcessorSection(path=str(folder)), model.config)
    loaded.head, loaded.labels = head if head == STATES else family_head(model.config, head), labels
    loaded.quantized = [delta.kind_name(wrapper) for wrapper in (known[-1] if known else ())]
    layers = list(saved.layers) if saved is not None else []
    layers += imported(base, model)
    if continue_ and layers:
        loaded.continued = layers.pop()
    for index, layer in enumerate(layers):
        loaded.mounted += delta.mount_layer(model, delta.adjust(layer, options or {}), index)
    if any("new_rows" in name for layer in layers for name in layer.tensors):
        new_token_rows.fold_token_rows(model)
    loaded.layers = layers
    return loaded


def original(loaded: LoadedModel, seed: int) -> nn.Module:
    """Load the base of a loaded model once more, without quantization and without what is mounted on it."""
    return load_model(
        loaded.section, rows_head=loaded.head, labels=loaded.labels, tokenizer=loaded.tokenizer, seed=seed
    ).requires_grad_(False)


def imported(section: ModelSection, model: nn.Module) -> list[delta.Layer]:
    """Return the adapter folders a model section names, as layers."""
    if not section.adapters:
        return []

    return [read_adapter(path, model, weight) for path, weight in section.adapters.items()]


def check_saved_base(model: nn.Module, base: ModelSection, saved: delta.SavedStack, folder: Path, restored: bool) -> None:
    """Refuse to mount saved stacks on another base than the one they were trained on.

    Two fingerprints are compared: that of the weights as they are stored, which are to the bit what was trained on, and, where
    they are stored in another way, that of the files they come from.

    Args:
        restored: whether the base is stored as it was in training.

    Raises:
        ModelError: it is another base; or the same one, in another dtype.
    """
    trained = saved.base.get("section", {}).get("dtype", "auto")
    if restored and not (delta.differs(model, saved) and base.dtype == trained == "auto" and same_base(base, folder)):
        delta.check_base(model, saved, str(folder), base.dtype)
        return
    same = same_base(base, folder)
    if same is False:
        raise ModelError(f"{folder} was trained on another base model: the weights in {base.path} have other content")
    if same is None:
        logger.warning("%s keeps no hashes of its base, so it is not known whether %s is the same", folder, base.path)
    else:
        logger.info("%s: the same base, stored in another way than in training", folder)


_shared: ContextVar[dict[str, PreTrainedTokenizerBase] | None] = ContextVar("shared tokenizers", default=None)


@contextlib.contextmanager
def shared_tokenizers() -> Iterator[None]:
    """Read a tokenizer once however often `tokenizer_of` returns it inside; who gets it must leave it as it is."""
    before = _shared.set({})
    try:
        yield
    finally:
        _shared.reset(before)


def tokenizer_of(section: ModelSection, tokenizer: TokenizerSection) -> PreTrainedTokenizerBase:
    """Return the tokenizer a model is loaded with, without reading weights (see `shared_tokenizers`)."""
    base, _, folder = resolve_section(section, tensors=False)
    own, known = own_tokenizer(tokenizer, folder), _shared.get()
    if known is None:
        return load_tokenizer(base, own)
    key = repr((base, own))
    if key not in known:
        known[key] = load_tokenizer(base, own)
    return known[key]


def own_tokenizer(tokenizer: TokenizerSection, folder: Path | None) -> TokenizerSection:
    """Return the section with the tokenizer in a run's folder, unless the recipe names or trains another."""
    own = tokenizer.path is not None or tokenizer.train is not None
    if folder is not None and not own and (folder / "tokenizer_config.json").is_file():
        return tokenizer.model_copy(update={"path": str(folder)})
    return tokenizer


FOLDS = {"weight": 0, "wrap_forward": 1, "after": 2, "before": 3}
"""Folding order of the kinds of hook: y = after(wrap_forward(W', before(x))); what adds to y sees the changed x."""


def merge_order(loaded: LoadedModel) -> list[Wrapper]:
    """Return mounted wrappers in the order in which folding is exact, that of the forward pass (see `models.hooks.host`).

    Replaced tensors, then replaced calls (DoRA saw the bare weight), then what adds to the output and what scales the sum, by
    `Hook.order`, then scalings of the input; ties in stack order. Entries that are trained in place are in W from the start,
    and recomputed codes and trained biases are written here, since later they would overwrite what was folded before.
    """
    finalize_codes(loaded.model)
    finalize_selections(loaded.model)
    finalize_biases(loaded.model)

    def place(wrapper: Wrapper) -> tuple[int, int]:
        hooks = [hook for _, _, _, hook in all_hooks(loaded.model, wrapper.name)]
        places = [(FOLDS.get(hook_kind(p), 4), p.order) for p in hooks if hook_kind(p) != "after" or p.order >= DELTA]
        return max(places, default=(0, 0))

    return sorted(loaded.mounted, key=place)


def check_mergeable(wrappers: Sequence[Wrapper]) -> None:
    """Refuse to train every weight where one of the stacks below cannot be folded into the weights.

    Raises:
        ModelError: it names the method.
    """
    for wrapper in wrappers:
        if not wrapper.merges():
            name = wrapper.name.split("_", 1)[1] if wrapper.name.startswith("mounted") else wrapper.name
            raise ModelError(
                f"model.path: this run's '{name}' cannot be merged into the weights, so they cannot all be trained further; "
                "add a stack, or set model.continue=true"
            )


def merge_mounted(loaded: LoadedModel) -> None:
    """Fold mounted stacks into the base weights, for runs that train every weight.

    Raises:
        ModelError: a mounted method cannot be folded.
    """
    check_mergeable(loaded.mounted)
    order = merge_order(loaded)
    # Mounted stacks were fitted to the weights as they are stored, and merge into these.
    dequantize_model(loaded.model)
    for wrapper in order:
        wrapper.merge(loaded.model)
    loaded.merged = loaded.merged or bool(loaded.mounted)
    loaded.mounted, loaded.layers = [], []
