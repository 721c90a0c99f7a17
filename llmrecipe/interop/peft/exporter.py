"""PEFT export: an adapter folder that `peft` loads, verified by reading it back onto a fresh base.

The verification does not need peft: the written files are read by `importer`, put on a freshly loaded base, and must give
the logits of the run. What PEFT cannot express is refused, with the reason, before anything is written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmrecipe.core.errors import ModelError
from llmrecipe.interop import verify_logits
from llmrecipe.interop.adapter_hub import hub_adapters
from llmrecipe.interop.golden import dtype_name, golden_answer
from llmrecipe.interop.load_run import open_run
from llmrecipe.interop.merged import Exported, dtype_of, refuse_label_head, target_folder, writing
from llmrecipe.interop.peft import bias_adapters, layout
from llmrecipe.interop.peft.converters import native_adapter
from llmrecipe.interop.peft.layout import Adapter, Branch
from llmrecipe.methods._engines import low_rank
from llmrecipe.methods._engines.biases import BiasMaster, masters
from llmrecipe.methods._engines.loftq_codes import Requantized
from llmrecipe.methods._engines.low_rank import LowRank, LowRankEmbedding, LowRankExperts, LowRankTiedHead
from llmrecipe.methods.reparameterized.dora import Magnitude
from llmrecipe.models.checkpoint_path import locate
from llmrecipe.models.hooks.hook import all_hooks
from llmrecipe.models.pretrained import pretrained
from llmrecipe.models.site_finder import widths
from llmrecipe.models.task_heads import is_head
from llmrecipe.recipe.rights import RIGHTS
from llmrecipe.recipe.schema import TokenizerSection
from llmrecipe.runs import delta
from llmrecipe.runs.delta import unmounted
from llmrecipe.runs.open_model import LoadedModel, open_saved

if TYPE_CHECKING:
    from llmrecipe.methods._base.method import Wrapper
    from llmrecipe.models.pretrained import LanguageModel

COMMAND = "export --to peft"
TASKS = {
    "classification": "SEQ_CLS",
    "token_classification": "TOKEN_CLS",
    "question_answering": "QUESTION_ANS",
    "seq2seq": "SEQ_2_SEQ_LM",
    "causal": "CAUSAL_LM",
}


def export_peft(
    run: str | Path,
    out: str | Path | None = None,
    *,
    bound: float | None = None,
    uniform: bool = False,
    as_lora: bool = False,
    options: dict[str, dict[str, Any]] | None = None,
    loaded: LoadedModel | None = None,
    rights: Mapping[str, bool] | None = None,
    check: Callable[[Adapter], None] = lambda adapter: None,
    command: str = COMMAND,
) -> Exported:
    """Write a run's methods as a PEFT adapter folder.

    Args:
        out: the folder; default `RUN/peft`. It must not exist yet.
        bound: see `export_merged`.
        uniform: one rank and scale everywhere, for servers that ignore rank and alpha patterns (vLLM).
        as_lora: write methods that are a low-rank change of the weights (AdaLoRA) as plain LoRA.
        options, rights: see `open_run`.
        loaded: what to write instead of the run itself (see `merge_adapters.open_combination`).
        check: refuses an adapter before it is written.
        command: begins the messages of refusals.

    Raises:
        ModelError: PEFT has no counterpart (said before anything is written), or the logits moved.
        RunError: the folder exists, or the disk is full.
    """
    target = target_folder(run, out, "peft")
    loaded = loaded or open_run(str(run), options=options, rights=rights)
    refuse_label_head(loaded, "peft")
    if not loaded.mounted:
        raise ModelError(f"{command}: every weight of this run was trained, so there is no adapter; use --to merged")
    saved = saved_from(loaded)
    adapter = adapter_of(loaded, saved, uniform=uniform, as_lora=as_lora, command=command)
    check(adapter)
    difference = verified(target, loaded, lambda aside: layout.write_adapter_folder(aside, adapter), bound)
    return Exported(target, difference, _notes(loaded, adapter))


def verified(target: Path, loaded: LoadedModel, write: Callable[[Path], None], bound: float | None) -> verify_logits.Difference:
    """Write an adapter folder with its tokenizer and golden answer, and read it back onto a fresh base.

    Args:
        write: puts the adapter's own files into a folder.

    Raises:
        ModelError: the logits differ; nothing is left on disk.
        RunError: the disk is full.
    """
    saved = saved_from(loaded)
    ids = verify_logits.probe_inputs(loaded.model, loaded.tokenizer)
    wanted = verify_logits.logits_of(loaded.model, ids)
    wide = dtype_of(loaded.model)
    with writing(target) as aside:
        write(aside)
        loaded.tokenizer.save_pretrained(aside)
        loaded.model = pretrained(nn.Identity())  # one model in memory at a time
        again = reread(aside, loaded, saved)
        difference = verify_logits.compare_logits(wanted, verify_logits.logits_of(again, ids), wide, bound)
        verify_logits.demand(difference, "the adapter", "Export merged instead, or report this as a bug.")
        base = {key: value for key, value in saved.base["section"].items() if key != "dtype"}
        golden = golden_answer(again, loaded.tokenizer)
        replace(
            golden,
            dtype=dtype_name(wide),
            head=loaded.head,
            labels=loaded.labels or [],
            model=base,
            quantized=loaded.quantized,
        ).write(aside)
    return difference


def export_adapter_hub(
    run: str | Path,
    out: str | Path | None = None,
    *,
    bound: float | None = None,
    loaded: LoadedModel | None = None,
    rights: Mapping[str, bool] | None = None,
) -> Exported:
    """Write a run's bottleneck adapter as a folder that adapter-hub's `adapters` library loads.

    Args:
        out: the folder; default `RUN/adapter_hub`. It must not exist yet.
        bound: see `export_merged`.
        loaded: what to write instead of the run itself.
        rights: see `open_run`.

    Raises:
        ModelError: the library cannot hold the run (said before anything is written), or the logits moved.
        RunError: the folder exists, or the disk is full.
    """
    target = target_folder(run, out, "adapter_hub")
    loaded = loaded or open_run(str(run), rights=rights)
    refuse_label_head(loaded, "adapter_hub")
    made = hub_adapters.hub_files(loaded)
    heads = head_tensors(loaded)
    about = hub_adapters.head_config(loaded) if heads else {}
    difference = verified(target, loaded, lambda aside: hub_adapters.write_hub_adapter(aside, *made, about, heads), bound)
    call = f"model.load_adapter('{target}', use_safetensors=True, set_active=True)"
    return Exported(target, difference, [f"after adapters.init(model): {call}"])


def saved_from(loaded: LoadedModel) -> delta.SavedStack:
    """Return what a `stack.yaml` of this model would say."""
    section = loaded.section.model_dump(exclude_defaults=True, exclude={"path", "continue_", "adapters", *RIGHTS})
    base = {"path": loaded.section.path, "fingerprint": loaded.base_fingerprint, "section": section}
    return delta.SavedStack(base, loaded.layers, loaded.head, loaded.labels)


def reread(folder: Path, loaded: LoadedModel, saved: delta.SavedStack) -> LanguageModel:
    """Load a fresh base, stored as in training, with the written adapter on top."""
    section = loaded.section.model_copy(update={"adapters": {str(folder): 1.0}})
    return open_saved(section, delta.without_injected(saved), folder, TokenizerSection(), head=saved.head).model


def adapter_of(
    loaded: LoadedModel, saved: delta.SavedStack, *, uniform: bool = False, as_lora: bool = False, command: str = COMMAND
) -> Adapter:
    """Return the adapter of a run in PEFT's layout; arguments as in `export_peft`.

    Raises:
        ModelError: PEFT has no counterpart for something in the stack.
    """
    if any("new_rows" in name for layer in saved.layers for name in layer.tensors):
        raise ModelError(
            f"{command}: tokens were added to the vocabulary, and the base that the adapter names does not have them; use "
            "--to merged"
        )
    native = [(w, made) for w in loaded.mounted if (made := None if as_lora else native_adapter(w, loaded.model)) is not None]
    if native and len(loaded.mounted) == 1:
        adapter = native[0][1]
    else:
        branches = branches_of(loaded.model, loaded.mounted, command)
        first = loaded.mounted[0]
        adapter = layout.lora_adapter(
            layout.with_one_rank(layout.concatenate_branches(branches)) if uniform else branches,
            use_rslora=not uniform and all(getattr(w, "use_rslora", False) for w in loaded.mounted),
            dropout=float(getattr(first, "dropout", 0.0)),
        )
    if adapter.config["peft_type"] not in bias_adapters.KINDS:
        layout.add_biases(adapter, trained_biases(loaded.model))
    heads = head_tensors(loaded)
    adapter.tensors |= {layout.PREFIX + name: value for name, value in heads.items()}
    adapter.config |= {
        "base_model_name_or_path": locate(saved.base["path"])[0],
        "task_type": TASKS.get(saved.head, "FEATURE_EXTRACTION"),
        "modules_to_save": sorted({name.rpartition(".")[0] for name in heads}) or None,
    }
    _shorten(adapter.config, loaded.model)
    return adapter


def branches_of(model: nn.Module, wrappers: Sequence[Wrapper], command: str = COMMAND) -> list[Branch]:
    """Return every low-rank change of wrappers on a model, without the biases trained with them (see `trained_biases`).

    Args:
        command: begins the messages of refusals.

    Raises:
        ModelError: one of them is not a low-rank change of a weight, or of one in other codes than the base's.
    """
    chosen = next((hook.owner for _, _, _, hook in all_hooks(model) if isinstance(hook, Requantized)), None)
    if chosen is not None:
        raise ModelError(
            f"{command}: '{unmounted(chosen)}' stands on 4-bit codes chosen together with it (loftq_iter), and a "
            "PEFT folder has no place for them; use --to merged"
        )
    branches: list[Branch] = []
    adjacent = any(branch_of(path, module, hook) is not None for path, module, _, hook in all_hooks(model))
    for wrapper in wrappers:
        own = [(path, module, hook) for path, module, _, hook in all_hooks(model, wrapper.name)]
        hooks = [place for place in own if not isinstance(place[2], BiasMaster)]
        found = [branch for place in hooks if (branch := branch_of(*place)) is not None]
        if len(found) < len(hooks) or not (found or (adjacent and own)):
            others = len(wrappers) > 1 and native_adapter(wrapper, model) is not None
            why = "PEFT cannot hold it together with the other stacks of this run" if others else "PEFT has no such method"
            raise ModelError(
                f"{command}: {why} ('{unmounted(wrapper.name)}')"
                + ("; use --to merged" if wrapper.merges() else "; llmrecipe.load(run) uses it as it is")
            )
        branches += found
    return branches


@torch.no_grad()
def trained_biases(model: nn.Module) -> dict[str, Tensor]:
    """Map parameter name to value for every bias of the base that trained, under all of its names."""
    values: dict[int, Tensor] = {}
    for _, module, _, hook in masters(model):
        own: Any = getattr(module, hook.tensor)
        values[id(own)] = hook.weight(values.get(id(own), low_rank.wide(own)))
    return {name: values[id(p)] for name, p in model.named_parameters(remove_duplicate=False) if id(p) in values}


def branch_of(path: str, module: nn.Module, hook: nn.Module) -> Branch | None:
    """Return a hook as a low-rank change of its host's weight; None where it is something else."""
    if isinstance(hook, LowRank):
        A, B, scale = hook.factors()
        bias = None if hook.bias is None else hook.bias.detach()
        if hook.rows is not None:
            B = B.new_zeros(widths(module, 0)[1], B.shape[1]).index_copy(0, hook.rows, B)
            bias = None if bias is None else bias.new_zeros(B.shape[0]).index_copy(0, hook.rows, bias)
        return Branch(path, "linear", A, B, scale, "", hook.vector(), bias)
    if isinstance(hook, Magnitude):
        A, B, m = hook.branch()
        return Branch(path, "embedding" if hook.embeds else "linear", A, B, 1.0, "", m)
    if isinstance(hook, LowRankTiedHead):
        pair = hook.pair[0]
        return Branch(path, "linear", pair.B.detach().t(), pair.A.detach().t(), pair.scale)
    if isinstance(hook, LowRankEmbedding):
        return Branch(path, "embedding", hook.A.detach(), hook.B.detach(), hook.scale, "", hook.vector())
    if isinstance(hook, LowRankExperts):
        return Branch(path, "experts", hook.A.detach(), hook.B.detach(), hook.scale, hook.tensor)
    return None


def head_tensors(loaded: LoadedModel) -> dict[str, Tensor]:
    """Return the task heads that were trained with the methods, as they are now."""
    return {n: p.detach() for n, p in loaded.model.named_parameters() if is_head(loaded.model, n)}


def _shorten(config: dict[str, Any], model: nn.Module) -> None:
    """Write `q_proj` for the paths of all modules of that name."""
    paths = set(config.get("target_modules") or [])
    if not paths:
        return
    everywhere: dict[str, set[str]] = {}
    for path, _ in model.named_modules():
        everywhere.setdefault(path.rpartition(".")[2], set()).add(path)
    short = {leaf for leaf in {p.rpartition(".")[2] for p in paths} if everywhere[leaf] <= paths}
    for key in ("target_modules", "feedforward_modules"):
        if config.get(key):
            config[key] = sorted({leaf if (leaf := p.rpartition(".")[2]) in short else p for p in config[key]})
    if config["peft_type"] not in bias_adapters.KINDS:
        config["fan_in_fan_out"] = any(type(model.get_submodule(p)).__name__ == "Conv1D" for p in paths)


def _notes(loaded: LoadedModel, adapter: Adapter) -> list[str]:
    config = adapter.config
    notes = [f"{config['peft_type']} for {config['base_model_name_or_path']}"]
    for name in loaded.quantized:
        notes.append(f"trained on a base quantized by {name}: load the base with the same quantization, or export merged")
    if len(loaded.mounted) > 1:
        notes.append(f"{len(loaded.mounted)} stacks of this run's chain were joined into one adapter")
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        notes.append("ranks or scales differ between modules; servers that ignore patterns (vLLM) need --uniform")
    for option, what in (("lora_bias", "its branches have biases"), ("bias", "biases of the base trained with it")):
        if config.get(option) not in (None, False, "none"):
            notes.append(f"{what}; a server that does not read {option} drops them, so export merged for it")
    return notes
