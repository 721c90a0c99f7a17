"""Export of a text encoder as a folder that the sentence-transformers library loads.

The folder is a pipeline, named in `modules.json`: the backbone, which Transformers loads alone, a pooling
(`1_Pooling/config.json`), then a dense layer and a scaling to length 1 where the run has them. Before the folder is in place
the backbone is loaded by Transformers, and the steps of the pipeline must give the vectors of the run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel

from llmrecipe.core.errors import ModelError, RunError
from llmrecipe.core.foreign import read_json
from llmrecipe.interop import verify_logits
from llmrecipe.interop.golden import golden_vector
from llmrecipe.interop.load_run import open_run
from llmrecipe.interop.merged import Exported, fold_mounted, kept_dtype, reason, target_folder, widen, writing
from llmrecipe.methods._engines.quantized import quantized
from llmrecipe.models import folder_pooling
from llmrecipe.models.attention_calls import stock_backend
from llmrecipe.models.checkpoint_path import run_folder
from llmrecipe.models.heads.label_head import LabelHead
from llmrecipe.models.native.config import NativeConfig
from llmrecipe.models.pretrained import pretrained
from llmrecipe.models.resolve_class import quiet
from llmrecipe.models.task_heads import ATTRIBUTE, POOLING_FILE

if TYPE_CHECKING:
    from llmrecipe.models.pretrained import LanguageModel


NAME = "sentence_transformers"
MODES = {"cls": folder_pooling.MODES["cls"], "avg": folder_pooling.MODES["mean"], "last": folder_pooling.MODES["last"]}
"""Pooling -> its switch in `1_Pooling/config.json`."""
HEAD = "pool"
"""Role of the head behind the pooled states of `contrastive`; another role is named with the pooling."""
DENSE = "2_Dense"
"""Folder of the layer behind the pooled states."""
TANH, IDENTITY = "torch.nn.modules.activation.Tanh", "torch.nn.modules.linear.Identity"


@dataclass(frozen=True)
class DenseStep:
    """The layer behind the pooled states: activation(W h + b), W (P, D)."""

    weight: Tensor
    bias: Tensor
    activation: str


def export_sentence_transformers(
    run: str | Path,
    out: str | Path | None = None,
    *,
    dtype: str = "auto",
    bound: float | None = None,
    rights: Mapping[str, bool] | None = None,
) -> Exported:
    """Write a run that pools the states of a text as a sentence-transformers folder; arguments as in `merged.export_merged`.

    Raises:
        ModelError: the library has no such pooling, a method cannot be folded, or the vectors moved.
        RunError: the run does not say how it pools, the folder exists, or the disk is full.
    """
    target = target_folder(run, out, NAME)
    pooling = pooling_of(run)
    loaded = open_run(str(run), rights=rights)
    for wrapper in loaded.mounted:
        if not wrapper.merges():
            name = wrapper.name.split("_", 1)[1]
            raise ModelError(f"export --to {NAME}: '{name}' cannot be folded into the weights: {reason(wrapper)}")
    model = loaded.model
    wide = kept_dtype(loaded) if dtype == "auto" else getattr(torch, dtype)
    if not any(quantized(model)):
        widen(model, wide)
    ids = verify_logits.probe_inputs(model, loaded.tokenizer)
    dense = _dense_step(model, pooling)
    wanted = _vectors(pretrained(model.base_model), ids, pooling, dense)
    notes = fold_mounted(loaded, wide)
    if model.config.model_type == NativeConfig.model_type:
        notes.append("a native transformer: the folder loads after `import llmrecipe.models.native`")
    with writing(target) as folder:
        _write_backbone(loaded.model, folder, wide)
        loaded.tokenizer.save_pretrained(folder)
        _write_pipeline(folder, pooling, int(model.config.get_text_config().hidden_size), dense)
        with quiet():
            plain = AutoModel.from_pretrained(folder, dtype=wide)
        dense = _read_dense(folder)
        difference = verify_logits.compare_logits(wanted, _vectors(plain, ids, pooling, dense), wide, bound)
        verify_logits.demand(difference, "the exported encoder", "dtype=float32 rounds less; --bound allows more.")
        prompt = verify_logits.golden_ids(loaded.tokenizer, chat=False)
        golden_vector(_vectors(plain, torch.tensor([prompt]), pooling, dense)[0], prompt, wide).write(folder)
    return Exported(target, difference, notes)


def pooling_of(run: str | Path) -> dict[str, Any]:
    """Return how a finished run pools: `pool`, `mlp`, `normalize` and `max_length`.

    Raises:
        RunError: it does not say so.
        ModelError: the library has no such pooling.
    """
    folder = run_folder(str(run))
    if folder is None or not (folder / POOLING_FILE).is_file():
        raise RunError(
            f"export --to {NAME}: {run} does not pool its states; runs of objective=contrastive, "
            "and of classification and regression with objective.pooling, do"
        )
    found: dict[str, Any] = read_json(folder / POOLING_FILE, f"export --to {NAME}")
    if found.get("pool") not in MODES:
        raise ModelError(
            f"export --to {NAME}: objective.pool={found['pool']} has no counterpart in that library, which has "
            f"{', '.join(MODES)}; `llmrecipe.load(run)` uses it as it is"
        )
    return found


def _dense_step(model: LanguageModel, pooling: Mapping[str, Any]) -> DenseStep | None:
    """Return the layer behind the pooled states of a run: the tanh layer of `contrastive`, or one output a label."""
    role = pooling.get("head", HEAD if pooling["mlp"] else None)
    if role is None:
        return None
    head = getattr(model, ATTRIBUTE)[role]
    if isinstance(head, LabelHead):
        return DenseStep(head.out.weight, head.out.bias, IDENTITY)
    return DenseStep(head.weight, head.bias, TANH)


@torch.no_grad()
def _vectors(backbone: LanguageModel, ids: Tensor, pooling: Mapping[str, Any], dense: DenseStep | None) -> Tensor:
    """Return what the pipeline computes, (R, D), text by text and without dropout, from ids (R, T)."""
    backbone.eval()
    rows = []
    for row in ids.split(1):
        h = backbone(input_ids=row, attention_mask=torch.ones_like(row)).last_hidden_state[0].float()
        rows.append({"cls": h[0], "last": h[-1]}.get(pooling["pool"], h.mean(0)))
    z = torch.stack(rows)
    if dense is not None:
        z = F.linear(z, dense.weight.float(), dense.bias.float())
        z = torch.tanh(z) if dense.activation == TANH else z
    return F.normalize(z, dim=-1) if pooling["normalize"] else z


def vector_of(folder: Path, ids: list[int], dtype: torch.dtype) -> Tensor:
    """Return the vector (D,) that an exported folder gives for the token ids of a text.

    Raises:
        ModelError: the folder names no pooling that is written here.
    """
    with quiet():
        backbone = AutoModel.from_pretrained(folder, dtype=dtype, trust_remote_code=False)
    switch = folder_pooling.MODES.get(folder_pooling.folder_pooling(folder) or "")
    pool = next((name for name, own in MODES.items() if own == switch), None)
    if pool is None:
        raise ModelError(f"{folder}: its pooling is none of {', '.join(MODES)}")
    kinds = [str(step["type"]).rpartition(".")[2] for step in read_json(folder / folder_pooling.MODULES_FILE, kind=list)]
    pooling = {"pool": pool, "normalize": "Normalize" in kinds}
    return _vectors(backbone, torch.tensor([ids]), pooling, _read_dense(folder))[0]


def _read_dense(folder: Path) -> DenseStep | None:
    """Return the layer behind the pooled states that a folder has; None where it has none."""
    place = folder / DENSE
    if not place.is_dir():
        return None
    saved = load_file(place / "model.safetensors")
    return DenseStep(saved["linear.weight"], saved["linear.bias"], read_json(place / "config.json")["activation_function"])


def _write_backbone(model: LanguageModel, folder: Path, dtype: torch.dtype) -> None:
    backbone = pretrained(model.base_model)
    # The stock name, so that the folder loads where this package is not installed.
    attention = backbone.config._attn_implementation or ""
    backbone.config._attn_implementation_internal = stock_backend(attention) or None
    backbone.to(dtype)
    backbone.config.dtype = dtype
    with quiet():
        backbone.save_pretrained(folder)


def _write_pipeline(folder: Path, pooling: Mapping[str, Any], width: int, dense: DenseStep | None) -> None:
    switches = dict.fromkeys((*MODES.values(), *folder_pooling.MODES.values()))
    modes = {switch: switch == MODES[pooling["pool"]] for switch in switches}
    steps: list[tuple[str, dict[str, Any] | None]] = [
        ("Transformer", None),
        ("Pooling", {"word_embedding_dimension": width, **modes, "include_prompt": True}),
    ]
    if dense is not None:
        outputs = len(dense.weight)
        kind = {"in_features": width, "out_features": outputs, "bias": True, "activation_function": dense.activation}
        steps.append(("Dense", kind))
    if pooling["normalize"]:
        steps.append(("Normalize", None))
    modules = []
    for place, (name, config) in enumerate(steps):
        path = f"{place}_{name}" if place else ""
        modules.append({"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.models.{name}"})
        if place:
            (folder / path).mkdir()
        if config is not None:
            _write_json(folder / path / "config.json", config)
        if name == "Dense" and dense is not None:
            tensors = {"linear.weight": dense.weight, "linear.bias": dense.bias}
            save_file({k: v.detach().float().contiguous() for k, v in tensors.items()}, folder / path / "model.safetensors")
    _write_json(folder / "modules.json", modules)
    _write_json(folder / "sentence_bert_config.json", {"max_seq_length": pooling["max_length"], "do_lower_case": False})
    similarity = "cosine" if pooling["normalize"] else "euclidean"
    facts: dict[str, Any] = {"__version__": {}, "prompts": {}, "default_prompt_name": None, "similarity_fn_name": similarity}
    _write_json(folder / "config_sentence_transformers.json", facts)


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
