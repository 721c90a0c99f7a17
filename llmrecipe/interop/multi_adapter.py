"""Adapters of several finished runs on one base in memory: each is switched on by the context of a forward pass.

Every run's stack is mounted under names of its own. An adapter is a set of wrappers that are disabled (`Context.off`: those of
the other runs) and, where a method keeps tasks apart, the number of its task. Rows of a batch with different adapters
are run in groups of equal `off`; (IA)^3 runs that scale the same sites become the tasks of one (IA)^3, so that their rows
share one forward pass: the factors of row i are l[task_i].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from llmrecipe.core.errors import ModelError, did_you_mean
from llmrecipe.core.forward_context import Context, activate
from llmrecipe.core.tasks import Tasks, common
from llmrecipe.engine.generation import generate as generate_from
from llmrecipe.engine.sampling import Sampling
from llmrecipe.engine.trunk import token_logits
from llmrecipe.interop.verify_logits import adapter_head
from llmrecipe.methods._base.method import Stage, Wrapper
from llmrecipe.models.checkpoint_path import adapter_base, find_base, is_adapter, run_folder
from llmrecipe.models.hooks.hook import own_tensors
from llmrecipe.recipe.rights import without_rights
from llmrecipe.recipe.schema import ModelSection, TokenizerSection
from llmrecipe.runs import delta
from llmrecipe.runs.open_model import LoadedModel, imported, open_saved
from llmrecipe.runs.run_names import run_title

if TYPE_CHECKING:
    from transformers.modeling_outputs import CausalLMOutput


@dataclass(frozen=True)
class AdapterChoice:
    """One adapter."""

    run: str
    """Name of the run it comes from."""
    off: frozenset[str] = frozenset()
    """Wrappers that are disabled."""
    task: int | None = None
    """Number of its task, where a method keeps tasks apart."""


@dataclass
class Source:
    """One run before its weights are read."""

    name: str
    path: str
    base: str
    saved: delta.SavedStack
    folder: Path | None


class Adapters(nn.Module):
    """One base with several adapters; one of them is in use, and a batch may name one for each row.

    Args:
        loaded: the loaded base with every adapter mounted.
        choices: name -> adapter; the first is in use.
        tasks: name of a run -> the tasks it keeps apart, in the order of its choices.
    """

    def __init__(self, loaded: LoadedModel, choices: dict[str, AdapterChoice], tasks: dict[str, Tasks | None]):
        super().__init__()
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        self.loaded = loaded
        self.choices, self.tasks = choices, tasks
        self.used = next(iter(choices))

    def use(self, name: str) -> None:
        """Switch to an adapter.

        Raises:
            ModelError: there is none of that name.
        """
        self.choice(name)
        self.used = name

    def choice(self, name: str) -> AdapterChoice:
        """Return the adapter of a name.

        Raises:
            ModelError: there is none; the message lists them.
        """
        if name not in self.choices:
            known = ", ".join(self.choices)
            raise ModelError(f"no adapter is called '{name}'{did_you_mean(name, self.choices)} (loaded: {known})")
        return self.choices[name]

    def context(self, name: str | None = None) -> Context:
        """Return the context of forward passes under an adapter, by default the one in use."""
        choice = self.choice(name or self.used)
        device = next(self.model.parameters()).device
        task_ids = None if choice.task is None else torch.tensor([[choice.task]], device=device)
        return Context(off=choice.off, task_ids=task_ids)

    def groups(self, names: Sequence[str]) -> list[tuple[frozenset[str], list[int], list[int] | None]]:
        """Return the groups of rows that share a forward pass: (disabled wrappers, rows, their tasks)."""
        rows: dict[tuple[frozenset[str], bool], list[int]] = {}
        chosen = [self.choice(name) for name in names]
        for i, one in enumerate(chosen):
            rows.setdefault((one.off, one.task is not None), []).append(i)
        return [(off, own, [int(chosen[i].task or 0) for i in own] if tasks else None) for (off, tasks), own in rows.items()]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        adapters: Sequence[str] | None = None,
        **inputs: object,
    ) -> CausalLMOutput:
        """Return logits (R, T, V) of rows, each under its own adapter.

        Args:
            input_ids: (R, T).
            adapters: a name a row; by default the adapter in use for all.
            inputs: further inputs of the model; tensors of R rows are shared out with them.

        Returns:
            An output of Transformers that holds the logits.

        Raises:
            ModelError: an adapter is unknown, or there is not one name a row.
        """
        count = input_ids.shape[0]
        names = self._names(adapters, count)
        whole: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False, **inputs}
        logits: list[Tensor] = []
        order: list[int] = []
        for off, rows, tasks in self.groups(names):
            index = torch.tensor(rows, device=input_ids.device)
            part = {
                key: value[index] if isinstance(value, Tensor) and value.dim() and value.shape[0] == count else value
                for key, value in whole.items()
                if value is not None
            }
            task_ids = None if tasks is None else torch.tensor(tasks, device=input_ids.device)[:, None]
            with activate(Context(off=off, task_ids=task_ids, attention_mask=part.get("attention_mask"))):
                logits.append(token_logits(self.model(**part)))
            order += rows
        back = torch.tensor(order, device=input_ids.device).argsort()
        return CausalLMOutput(logits=torch.cat(logits)[back])

    def generate(
        self, prompts: Sequence[Sequence[int]], adapters: Sequence[str] | None = None, sampling: Sampling | None = None
    ) -> list[list[int]]:
        """Return the new token ids of each prompt, each under its own adapter.

        Raises:
            ModelError: an adapter is unknown, or there is not one name a prompt.
        """
        answers: list[list[int]] = [[] for _ in prompts]
        for off, rows, tasks in self.groups(self._names(adapters, len(prompts))):
            part = [prompts[i] for i in rows]
            new = generate_from(self.model, self.tokenizer, part, sampling or Sampling(), Context(off=off), tasks)
            for i, ids in zip(rows, new, strict=True):
                answers[i] = ids
        return answers

    def _names(self, adapters: Sequence[str] | None, count: int) -> list[str]:
        names = [self.used] * count if adapters is None else list(adapters)
        if len(names) != count:
            raise ModelError(f"adapters: {len(names)} names for {count} rows; give one a row")
        return names


def open_adapters(
    paths: Sequence[str],
    *,
    dtype: str = "auto",
    options: Mapping[str, Mapping[str, Mapping[str, Any]]] | None = None,
    rights: Mapping[str, bool] | None = None,
    device: str = "cpu",
) -> Adapters:
    """Load several runs, or PEFT adapter folders, side by side on their common base.

    Names are the folders' own where they differ, else the paths; a run that keeps tasks apart gives one adapter a task,
    `run/task`.

    Args:
        options: path -> wrapper name -> options that may differ on a finished run (see `Wrapper.adjustable`).
        rights: what the person who opens them allows their base (see `recipe.rights`).
        device: see `open_run`.

    Raises:
        RunError: a folder holds no finished run.
        ModelError: bases, heads or quantization differ (raised before weights are read), or a run trained tensors of the base
            itself, which cannot be switched.
    """
    sources = [_source(path, name) for path, name in zip(paths, _names(paths), strict=True)]
    _check_alike(sources)
    first = sources[0]
    own = {} if dtype == "auto" else {"dtype": dtype}
    kept = without_rights(first.saved.base.get("section", {}))
    section = ModelSection(**{**kept, "path": first.base, **own, **(rights or {})})
    plain = delta.without_injected(first.saved)
    loaded = open_saved(section, plain, first.folder, TokenizerSection(), head=first.saved.head, device=device)
    loaded.layers = []
    for source in sources:
        if is_adapter(source.path):
            source.saved.layers = imported(section.model_copy(update={"adapters": {source.path: 1.0}}), loaded.model)
        chosen = (options or {}).get(source.path, {})
        source.saved.layers = [delta.adjust(layer, chosen) for layer in source.saved.layers]
    wrappers = {s.name: [delta.build_wrapper(n, m) for x in s.saved.layers for n, m in x.wrappers.items()] for s in sources}
    tasks = {name: mounted_tasks(own) for name, own in wrappers.items()}
    fused = _fused(sources)
    if fused is None:
        return Adapters(loaded, _mount_all(loaded, sources), tasks)
    _mount(loaded, [fused], frozenset(), first.path)
    runs = [name for name, own in tasks.items() for _ in range(len(own.names or ()) if own else 1)]
    names = fused.wrappers["ia3"]["tasks"]
    return Adapters(loaded, {n: AdapterChoice(run, task=i) for i, (n, run) in enumerate(zip(names, runs, strict=True))}, tasks)


def task_adapters(loaded: LoadedModel) -> Adapters | None:
    """Return the tasks of one loaded run as adapters; None where it keeps none apart."""
    tasks = mounted_tasks(loaded.mounted)
    if tasks is None:
        return None
    return Adapters(loaded, {name: AdapterChoice("", task=i) for i, name in enumerate(tasks.names or ())}, {"": tasks})


def mounted_tasks(wrappers: Sequence[Wrapper]) -> Tasks | None:
    """Return the tasks that mounted wrappers keep apart; None where they keep none."""
    return common([(w.name, found) for w in wrappers if (found := w.mixes()) is not None])


def _names(paths: Sequence[str]) -> list[str]:
    places = [Path(path).resolve() for path in paths]
    titles = [run_title(place) for place in places]
    short = titles if len(set(titles)) == len(titles) else [place.name for place in places]
    names = [path if short.count(name) > 1 else name for path, name in zip(paths, short, strict=True)]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ModelError(f"{twice} is given twice")
    return names


def _source(path: str, name: str) -> Source:
    """Describe what a path holds.

    Raises:
        RunError, ModelError: no finished run, or one without an adapter.
    """
    if is_adapter(path):
        base = adapter_base(path)
        return Source(name, path, base, delta.SavedStack({"path": base}, [], adapter_head(Path(path))), Path(path))
    folder = run_folder(path)
    if folder is None or not (folder / delta.STACK_FILE).is_file():
        what = "is no finished run" if folder is None else "trained every weight, so it has no adapter"
        raise ModelError(f"{path} {what}; only adapters of one base can stand side by side")
    saved = delta.read_stack(folder)
    return Source(name, path, find_base(saved.base, folder), saved, folder)


def _check_alike(sources: Sequence[Source]) -> None:
    """Check for one base, one head and one quantization.

    Raises:
        ModelError: two runs differ; both are named.
    """
    first = sources[0]
    prints = {s.name: s.saved.base.get("fingerprint") for s in sources}
    for other in sources[1:]:
        a, b = prints[first.name], prints[other.name]
        if (a and b and a != b) or (not (a and b) and other.base != first.base):
            raise ModelError(
                f"{other.path} stands on another base than {first.path} ({other.base}{f', {b}' if b else ''}; "
                f"{first.base}{f', {a}' if a else ''}); load each of them alone"
            )
        if other.saved.head != first.saved.head:
            raise ModelError(
                f"{other.path} was trained with a {other.saved.head} head and {first.path} with a {first.saved.head} head; "
                "load each of them alone"
            )
        bases = [delta.without_injected(s.saved).layers for s in (first, other)]
        kinds = [{m["kind"]: m for layer in layers for m in layer.wrappers.values()} for layers in bases]
        if kinds[0] != kinds[1]:
            shown = [", ".join(k) or "not quantized" for k in kinds]
            raise ModelError(
                f"{other.path} and {first.path} store their base differently ({shown[1]}; {shown[0]}); load each of them alone"
            )


def _mount_all(loaded: LoadedModel, sources: Sequence[Source]) -> dict[str, AdapterChoice]:
    own: dict[str, list[Wrapper]] = {}
    for source in sources:
        above = frozenset(w.name for wrappers in own.values() for w in wrappers)
        own[source.name] = _mount(loaded, source.saved.layers, above, source.path)
    choices: dict[str, AdapterChoice] = {}
    for source in sources:
        off = frozenset(w.name for name, wrappers in own.items() if name != source.name for w in wrappers)
        tasks = mounted_tasks(own[source.name])
        if tasks is None:
            choices[source.name] = AdapterChoice(source.name, off)
        for i, task in enumerate(tasks.names or () if tasks else ()):
            choices[f"{source.name}/{task}"] = AdapterChoice(source.name, off, i)
    return choices


def _mount(loaded: LoadedModel, layers: Sequence[delta.Layer], off: frozenset[str], path: str) -> list[Wrapper]:
    """Mount a run's layers while those of the others are disabled.

    Raises:
        ModelError: the run also changed tensors that belong to the base: every adapter would see them.
    """
    found: list[Wrapper] = []
    with activate(Context(off=off)):
        for layer in layers:
            index = len(loaded.layers)
            wrappers = delta.mount_layer(loaded.model, layer, index)
            loaded.layers.append(layer)
            names = {name: f"mounted{index}_{name}" for name in layer.wrappers}
            owned = {tensor for w in wrappers for tensor in own_tensors(loaded.model, w.name)}
            shared = sorted({delta.rename_tensor(tensor, names) for tensor in layer.tensors} - owned)
            if shared:
                raise ModelError(
                    f"{path} also trained {', '.join(shared[:3])}{' ...' * (len(shared) > 3)}, part of the base (heads, "
                    "norms, new rows); they cannot be switched with an adapter, so load this run alone"
                )
            found += wrappers
    loaded.mounted += found
    return found


def _only(layer: delta.Layer) -> str:
    return next(iter(layer.wrappers))


def _fused(sources: Sequence[Source]) -> delta.Layer | None:
    """Return the (IA)^3 runs as the tasks of one (IA)^3; None where a run is another method, or scales other sites."""
    layers: list[delta.Layer] = []
    for source in sources:
        own = [layer for layer in source.saved.layers if layer.tensors]
        every = [item for layer in own for item in layer.wrappers.items()]
        wrappers = {name: m for name, m in every if delta.build_wrapper(name, m).stage is not Stage.BASE}
        if len(own) != 1 or len(wrappers) != 1 or next(iter(wrappers.values()))["kind"] != "ia3":
            return None
        layers.append(replace(own[0], wrappers=wrappers))
    options = [{k: v for k, v in x.wrappers[_only(x)].items() if k not in ("tasks", "task_field")} for x in layers]
    renamed = [{delta.rename_tensor(t, {_only(x): "ia3"}): v for t, v in x.tensors.items()} for x in layers]
    counts = [max(1, len(x.wrappers[_only(x)].get("tasks") or [])) for x in layers]
    alike = all(o == options[0] for o in options) and all(t.keys() == renamed[0].keys() for t in renamed)
    if not alike or any(v.shape[0] != n for t, n in zip(renamed, counts, strict=True) for v in t.values()):
        return None
    names = []
    for source, layer in zip(sources, layers, strict=True):
        tasks = layer.wrappers[_only(layer)].get("tasks") or []
        names += [f"{source.name}/{task}" for task in tasks] or [source.name]
    tensors = {name: torch.cat([t[name] for t in renamed]) for name in renamed[0]}
    return delta.Layer({"ia3": {**options[0], "tasks": names}}, {}, tensors=tensors)
