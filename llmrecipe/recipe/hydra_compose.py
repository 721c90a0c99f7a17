"""The one module that calls Hydra: merging the files of a defaults chain with the chosen components and presets.

Hydra sees three sources: the files of the chain by id, the preset folders, and the registered components as plain
mappings in its ConfigStore (`stack/lora` holds `{lora: {kind: lora, ...}}`, `objective/dpo` holds `{kind: dpo,
...}`).
"""

from __future__ import annotations

import contextvars
import copy
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from llmrecipe.core import registry
from llmrecipe.core.errors import RecipeError, did_you_mean
from llmrecipe.recipe.inheritance import Choice, DefaultsChain
from llmrecipe.recipe.interpolation import check_file
from llmrecipe.recipe.provenance import Origin, Origins, leaves
from llmrecipe.recipe.recipe_paths import COMPONENT_GROUPS, PRESET_GROUPS, presets
from llmrecipe.recipe.yaml_file import YamlFile, read_yaml, short

_chain: contextvars.ContextVar[DefaultsChain | None] = contextvars.ContextVar("chain", default=None)
_lock = threading.Lock()
_kept: contextvars.ContextVar[dict[Any, Composed] | None] = contextvars.ContextVar("kept", default=None)


class _RecipeSource(ConfigSource):
    """Serves the files of the current defaults chain, and the preset folders."""

    @staticmethod
    def scheme() -> str:
        return "llmrecipe"

    def available(self) -> bool:
        return True

    def load_config(self, config_path: str) -> ConfigResult:
        name = config_path.removesuffix(".yaml")
        chain = _chain.get()
        if chain is not None and name in chain.links:
            link = chain.links[name]
            return self._result(config_path, {"defaults": link.defaults, **_body(link.source)}, "")
        group, _, option = name.partition("/")
        path = presets(group).get(option)
        if path is None:
            raise ConfigLoadError(f"no config {config_path}")
        return self._result(config_path, check_file(read_yaml(path)).value, group)

    def _result(self, config_path: str, value: dict[str, Any], package: str) -> ConfigResult:
        return ConfigResult(
            provider=self.provider, path=config_path, config=OmegaConf.create(value), header={"package": package}
        )

    def is_group(self, config_path: str) -> bool:
        return config_path.strip("/") in PRESET_GROUPS

    def is_config(self, config_path: str) -> bool:
        name = config_path.removesuffix(".yaml").strip("/")
        chain = _chain.get()
        group, _, option = name.partition("/")
        return (chain is not None and name in chain.links) or option in presets(group)

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        return sorted(presets(config_path.strip("/")))


class _RecipeSearchPath(SearchPathPlugin):
    """Puts the source before all others."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        if _chain.get() is not None:
            search_path.prepend(provider="llmrecipe", path="llmrecipe://")


def _body(source: YamlFile) -> dict[str, Any]:
    return {key: value for key, value in source.value.items() if key != "defaults"}


def _publish_components(chain: DefaultsChain, words: list[str]) -> None:
    """Put the components that are chosen anywhere into Hydra's ConfigStore (storing all would take 0.1 s).

    The store outlives a composition: it is emptied first, and every group gets a member, or Hydra would not know the group and
    refuse `stack=[]` unless an earlier composition had named a method.
    """
    store = ConfigStore.instance()
    text = " ".join([*words, *(str(link.choices) for link in chain.links.values())])
    open_ended = any(
        "defaults" in read_yaml(path).value for group in PRESET_GROUPS for path in presets(group).values() if path.stem in text
    )
    for group in COMPONENT_GROUPS:
        store.repo.pop(group, None)
        known = registry.names(group)
        for name in [n for n in known if n in text or open_ended] or known[:1]:
            defaults = registry.spec(group, name).defaults()
            node = {name: defaults} if group == "stack" else defaults
            store.store(group=group, name=name, node=OmegaConf.create(node), provider="registry")


@contextmanager
def _hydra(chain: DefaultsChain, words: list[str]) -> Iterator[None]:
    plugins = Plugins.instance()
    with _lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if _RecipeSearchPath not in plugins.discover(SearchPathPlugin):
            plugins.register(_RecipeSource)
            plugins.register(_RecipeSearchPath)
        _publish_components(chain, words)
        token = _chain.set(chain)
        try:
            with initialize(version_base="1.3", config_path=None):
                yield
        finally:
            _chain.reset(token)


@dataclass(frozen=True)
class Composed:
    """The mapping Hydra composed from a defaults chain and the group choices of the command line."""

    mapping: dict[str, Any]
    origins: Origins


@contextmanager
def kept_merges() -> Iterator[None]:
    """Merge the same files with the same choices once, as long as the context is open; the files must not change meanwhile.

    The stages of a pipeline's matrix differ in values that are set after the merge, which is most of the time of a composition.
    """
    token = _kept.set({} if _kept.get() is None else _kept.get())
    try:
        yield
    finally:
        _kept.reset(token)


def merge(chain: DefaultsChain, words: list[str]) -> Composed:
    """Merge a defaults chain with the group choices of the command line (`stack=[lora]`, `optim=lion`).

    Raises:
        RecipeError: files that contradict each other in shape.
    """
    kept = _kept.get()
    if kept is None:
        return _merge(chain, words)
    links = tuple((name, link.source.path, repr(link.defaults)) for name, link in chain.links.items())
    key = (chain.primary.id, links, tuple(words), tuple(registry.plugins()))
    if key not in kept:
        kept[key] = _merge(chain, words)
    return Composed(copy.deepcopy(kept[key].mapping), dict(kept[key].origins))


def _merge(chain: DefaultsChain, words: list[str]) -> Composed:
    primary = chain.primary.id
    try:
        with _hydra(chain, words):
            config = hydra_compose(config_name=primary, overrides=words)
            loader = GlobalHydra.instance().config_loader()
            layers = loader.compute_defaults_list(config_name=primary, overrides=words, run_mode=RunMode.RUN).defaults
            mapping: Any = OmegaConf.to_container(config, resolve=False)
    except (HydraException, OmegaConfBaseException) as error:
        raise RecipeError(f"{chain.primary.source.where()}: this recipe cannot be composed: {_reason(error)}") from error
    origins: Origins = {}
    for layer in layers:
        if layer.config_path and not layer.config_path.startswith("hydra/"):
            _mark(origins, chain, layer.config_path)
    return Composed({str(k): v for k, v in dict(mapping).items() if k != "hydra"}, origins)


def _reason(error: BaseException) -> str:
    """Return the innermost first line of an error, without Hydra's advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and "append to your config" not in line]
    return lines[-1] if lines and lines[0].startswith("In '") else lines[0] if lines else type(error).__name__


def _mark(origins: Origins, chain: DefaultsChain, config_path: str) -> None:
    """Record which values a merged layer set."""
    if config_path in chain.links:
        source = chain.links[config_path].source
        _mark_file(origins, source, _body(source), ())
        return
    group, _, option = config_path.partition("/")
    path = presets(group).get(option)
    if path is not None:
        source = read_yaml(path)
        _mark_file(origins, source, _body(source), (group,))
        return
    spec = registry.spec(group, option)
    at = ("stack", option) if group == "stack" else (group,)
    for key, _ in leaves(spec.defaults()):
        known = spec.options.get(str(key[0]))
        origins[(*at, *key)] = Origin("default", known.path if known else spec.path, known.line if known else spec.line)


def _mark_file(origins: Origins, source: YamlFile, body: dict[str, Any], at: tuple[str, ...]) -> None:
    for key, _ in leaves(body):
        line = source.lines.get(key, 1) if key else 1
        if key:
            # A value that replaces a mapping, or a mapping that replaces a value, invalidates the origins below or above it.
            for hidden in [k for k in origins if k[: len(at) + len(key)] == (*at, *key)]:
                del origins[hidden]
            origins[(*at, *key)] = Origin("file", source.path, line)


def refused_choices(group: str, choice: Choice, where: str) -> list[str]:
    """Return a message for every unknown component or preset of a choice: what exists, and the nearest spelling."""
    known = {*presets(group), *(registry.names(group) if group in COMPONENT_GROUPS else ())}
    listed = ", ".join(sorted(known)) or "none"
    messages: list[str] = []
    for name in [choice] if isinstance(choice, str) else choice or []:
        near = did_you_mean(str(name), known)
        if name not in known and group in COMPONENT_GROUPS:
            what = "method" if group == "stack" else group
            messages.append(f"{group}: there is no {what} '{name}'{near} (known: {listed}) [{where}]")
        elif name not in known:
            key = "device" if group == "runtime" else "path"
            instead = f"to give a value write {group}.{key}={name}"
            messages.append(f"{group}: there is no {group} preset '{name}'{near} (presets: {listed}); {instead} [{where}]")
        elif name in presets(group) and group in COMPONENT_GROUPS and name in registry.names(group):
            messages.append(f"{short(presets(group)[name])}: a preset may not have the name of the registered {group} '{name}'")
    return messages
