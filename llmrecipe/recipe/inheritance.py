"""Recipe inheritance: a recipe and the recipes it extends, each file read once, its defaults list prepared for Hydra.

A recipe names what it extends (`- /base`, `- /dpo_lora`) by stem, by `folder/stem` or by a path relative to itself. A group of
the user's own is a folder next to it (or in the search path) with one partial recipe for each option: `- experiment: fast` is
`experiment/fast.yaml`, extended at this place of the list, and `experiment=slow` on the command line is another one of them.
Each file of the defaults chain gets an id without folders, so that Hydra merges all of them at the top of the recipe
whatever folder they are in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmrecipe.core import registry
from llmrecipe.core.errors import RecipeError, did_you_mean
from llmrecipe.recipe.interpolation import check_file
from llmrecipe.recipe.recipe_paths import (
    COMPONENT_GROUPS,
    GROUPS,
    PRESET_GROUPS,
    adjacent_presets,
    all_recipes,
    lookup,
    packaged,
    presets,
    roots,
)
from llmrecipe.recipe.renames import renamed_file
from llmrecipe.recipe.rights import is_artefact
from llmrecipe.recipe.yaml_file import YamlFile, dotted, read_yaml, short

Choice = str | list[str] | None
"""What a defaults list chooses for a group: one name, for `stack` a list of names, or nothing."""

MOST = 100
"""Most entries of one defaults list."""


@dataclass
class Link:
    """One file of a defaults chain."""

    id: str
    """Its name for Hydra."""
    source: YamlFile
    extends: list[str] = field(default_factory=list)
    """Ids of the recipes it extends, in order."""
    choices: dict[str, tuple[Choice, int]] = field(default_factory=dict)
    """Group -> (what the file's own defaults list chooses, line)."""
    defaults: list[Any] = field(default_factory=list)
    """The defaults list for Hydra; `DefaultsChain.place` completes it."""
    foreign: bool = False
    """Whether it belongs to an artefact that is being opened, or is extended by a file that does (see `recipe.rights`)."""


class DefaultsChain:
    """All files of a recipe, by id; the recipe itself is `primary`."""

    def __init__(self, primary: Path, foreign: bool = False, picks: Mapping[str, Choice] | None = None):
        """Read a recipe and what it extends.

        Args:
            foreign: it belongs to an artefact that is being opened.
            picks: choices of the command line for groups of the user's own; those the recipe does not name are added to it.
        """
        self.links: dict[str, Link] = {}
        self.notes: list[str] = []
        self._picks = dict(picks or {})
        self._own_groups: set[str] = set()
        self._foreign = {primary.resolve()} if foreign or is_artefact(primary) else set()
        self.folder = primary.resolve().parent
        self.primary = self._add(primary.resolve(), ())
        for group in sorted(set(self._picks) - self._own_groups):
            self.primary.defaults += self._extend_group(self.primary, group, f"'{group}='", False, (primary.resolve(),))

    def _add(self, path: Path, under: tuple[Path, ...]) -> Link:
        if path in under:
            circle = " -> ".join(short(p) for p in (*under[under.index(path) :], path))
            raise RecipeError(f"defaults: recipes extend each other in a circle: {circle}")
        known = next((link for link in self.links.values() if link.source.path.resolve() == path), None)
        if known is not None:
            return known
        if is_artefact(path):
            self._foreign.add(path)
        link = Link(id=f"recipe{len(self.links)}", source=check_file(renamed_file(read_yaml(path), self.notes)))
        link.foreign = not self._foreign.isdisjoint((*under, path))
        self.links[link.id] = link
        _check_body(link.source)
        self._read_defaults(link, (*under, path))
        return link

    def _read_defaults(self, link: Link, under: tuple[Path, ...]) -> None:
        source = link.source
        entries = source.value.get("defaults")
        if entries is None:
            entries = _implied(source)
        if not isinstance(entries, list):
            raise RecipeError(f"{source.where('defaults')}: defaults is a list, such as `- /base`; got {entries!r:.60}")
        if len(entries) > MOST:
            raise RecipeError(f"{source.where('defaults')}: {len(entries):,} entries; at most {MOST} are read")
        parents: list[Any] = []
        for entry in entries:
            if isinstance(entry, dict) and len(entry) == 1 and (group := _words_of(entry)[1]) not in GROUPS:
                # The outermost file decides, and it is read first.
                self._picks.setdefault(group, entry[next(iter(entry))])
        for index, entry in enumerate(entries):
            where = source.where("defaults", index)
            if isinstance(entry, str) and entry != "_self_" and entry.strip("/").split("/")[0].split("@")[0] not in GROUPS:
                parents += self._extend(link, self._resolve(entry, source.path, where), under)
            elif isinstance(entry, dict) and len(entry) == 1 and _words_of(entry)[1] not in GROUPS:
                words, group = _words_of(entry)
                self._check_group(group, source.path, where)
                if "override" not in words:
                    self._own_groups.add(group)
                    parents += self._extend_group(link, group, where, "optional" in words, under)
            elif isinstance(entry, dict) and len(entry) == 1:
                group, choice = _group_entry(entry, where)
                if "optional" in _words_of(entry)[0] and (missing := self._missing(group, choice, source.path)):
                    self.notes.append(f"{where}: there is no {group} {', '.join(missing)}; it is optional and left out")
                else:
                    link.choices[group] = (choice, _line(source, index))
            elif entry == "_self_":
                parents.append(entry)
            else:
                raise RecipeError(
                    f"{where}: an entry of defaults is `- /RECIPE`, `- override /GROUP: NAME`, `- optional GROUP: NAME` "
                    f"or `- _self_`; got {entry!r:.60}"
                )
        is_base = source.path.stem == "base" and source.path.parent in [*roots(), packaged().resolve()]
        if not is_base and not any(self._stands_on_base(i) for i in link.extends):
            parents = self._extend(link, self._resolve("/base", source.path, short(source.path)), under, first=True) + parents
        if "_self_" not in parents:
            parents.append("_self_")
        link.defaults = parents

    def _extend(self, link: Link, path: Path, under: tuple[Path, ...], first: bool = False) -> list[str]:
        """Extend a file by another one, before all others if `first`; return the entry for Hydra.

        There is none for a file that was reached before: it is merged once, where it is first named.
        """
        before = len(self.links)
        parent = self._add(path, under)
        link.extends.insert(0 if first else len(link.extends), parent.id)
        return [f"/{parent.id}"] if len(self.links) > before else []

    def _missing(self, group: str, choice: Choice, source: Path) -> list[str]:
        """Return the options of an optional choice that do not exist."""
        names = [choice] if isinstance(choice, str) else choice or []
        folders = [] if self.links[next(iter(self.links))].foreign else [source.parent, self.folder]
        with adjacent_presets(folders):
            known = {*presets(group), *(registry.names(group) if group in COMPONENT_GROUPS else ())}
        return [name for name in names if name not in known]

    def _check_group(self, group: str, source: Path, where: str) -> None:
        if group_folder(group, (source.parent, self.folder)) is None:
            raise RecipeError(
                f"{where}: defaults has no group '{group}'{did_you_mean(group, GROUPS)} (groups: {', '.join(GROUPS)}), "
                f"and there is no folder {group}/ next to {short(source)}"
            )

    def _extend_group(self, link: Link, group: str, where: str, optional: bool, under: tuple[Path, ...]) -> list[str]:
        """Extend a file by the options that are chosen of a group of the user's own; return entries for Hydra.

        Raises:
            RecipeError: the group's folder has no such option.
        """
        choice = self._picks.get(group)
        entries: list[str] = []
        for name in [choice] if isinstance(choice, str) else choice or []:
            folder = group_folder(group, (link.source.path.parent, self.folder))
            assert folder is not None, "groups are checked before they are read"
            known = {path.stem: path for path in sorted(folder.glob("*.y*ml"))}
            if not isinstance(name, str) or name not in known:
                if optional:
                    self.notes.append(f"{where}: there is no {group} {name}; it is optional and left out")
                    continue
                raise RecipeError(
                    f"{where}: there is no {group} '{name}'{did_you_mean(str(name), known)} "
                    f"(in {short(folder)}: {', '.join(known) or 'nothing'})"
                )
            entries += self._extend(link, known[name].resolve(), under)
        return entries

    def folders(self) -> list[Path]:
        """Return the folders of the user's files, whose presets are found by name; artefacts give none."""
        ours = [link.source.path.parent for link in self.links.values() if not link.foreign]
        return [folder for folder in dict.fromkeys(ours) if not folder.resolve().is_relative_to(packaged().resolve())]

    def place(self, words: dict[str, Any]) -> None:
        """Write the group choices into the defaults lists; those of the command line (group -> choice) take precedence.

        A component replaces the one base chose. A preset is merged just before the body of the file that chose it, or last when
        the command line chose it, so that an extended recipe never overrides a choice.
        """
        files = {group for link in self.links.values() for group in link.choices}
        for group in sorted(files | set(words)):
            holder = self.holder(self.primary.id, group)
            choice = words[group] if group in words else holder.choices[group][0] if holder else None
            preset = isinstance(choice, str) and choice in presets(group)
            if preset:
                owner = self.primary if group in words else holder or self.primary
                entry = f"/{group}/{choice}"
                at = len(owner.defaults) if group in words else owner.defaults.index("_self_")
                owner.defaults.insert(at, entry)
        for link in self.links.values():
            inherited = set().union(*(self._components(i) for i in link.extends))
            for group in self._own_components(link):
                word = f"override /{group}" if group in inherited else f"/{group}"
                link.defaults.append({word: link.choices[group][0]})

    def holder(self, link_id: str, group: str) -> Link | None:
        """Return the file whose choice for a group is effective: the outermost one."""
        link = self.links[link_id]
        if group in link.choices:
            return link
        found = [holder for i in link.extends if (holder := self.holder(i, group)) is not None]
        return found[-1] if found else None

    def _own_components(self, link: Link) -> list[str]:
        return [
            g
            for g, (choice, _) in link.choices.items()
            if choice is not None and not (isinstance(choice, str) and choice in presets(g))
        ]

    def _components(self, link_id: str) -> set[str]:
        link = self.links[link_id]
        return set(self._own_components(link)).union(*(self._components(i) for i in link.extends))

    def _stands_on_base(self, link_id: str) -> bool:
        link = self.links[link_id]
        return link.source.path.stem == "base" or any(self._stands_on_base(i) for i in link.extends)

    def _resolve(self, name: str, source: Path, where: str) -> Path:
        # Next to the file and to the recipe that is run, and not below them: they may be in somebody's home folder.
        bare = name.removeprefix("/")
        for folder in dict.fromkeys((source.parent, self.folder)):
            for spelling in [bare] if bare.endswith((".yaml", ".yml")) else [f"{bare}.yaml", f"{bare}.yml"]:
                adjacent = (folder / spelling).resolve()
                if adjacent.is_file() and adjacent != source:
                    return adjacent
        found = lookup(bare, roots(), exclude=source)
        if found is None:
            word = name.strip("/")
            raise RecipeError(f"{where}: there is no recipe '{word}' to extend{did_you_mean(word, ['base', *all_recipes()])}")
        return found.resolve()

    def choice(self, link_id: str, group: str) -> Choice:
        """Return what a file, together with everything it extends, chooses for a group."""
        holder = self.holder(link_id, group)
        return holder.choices[group][0] if holder else None

    def plugins(self) -> list[str]:
        """Return the packages named under `plugins` by any file of the defaults chain."""
        lists = [link.source.value.get("plugins") for link in self.links.values()]
        return [p for named in lists if isinstance(named, list) for p in named if isinstance(p, str)]

    def own_files(self, worded: set[str]) -> list[Path]:
        """Return the user's files: those that are not foreign, and the presets that they or the command line chose.

        Args:
            worded: groups the command line chose.
        """
        files = [link.source.path for link in self.links.values() if not link.foreign]
        for group in PRESET_GROUPS:
            holder = self.holder(self.primary.id, group)
            if group in worded or (holder is not None and not holder.foreign):
                files += presets(group).values()
        return files

    def below(self, link: Link) -> list[Link]:
        """Return the files a file extends, at any depth."""
        direct = [self.links[i] for i in link.extends]
        return [*direct, *(further for inner in direct for further in self.below(inner))]


def _line(source: YamlFile, index: int) -> int:
    return source.lines.get(("defaults", index), source.lines.get(("defaults",), 1))


def group_folder(group: str, folders: Iterable[Path]) -> Path | None:
    """Return the folder of a group of the user's own: next to a recipe, else in the search path."""
    if not group.isidentifier():
        return None
    places = [folder / group for folder in (*folders, *(root for root in roots() if root != packaged().resolve()))]
    return next((place for place in places if place.is_dir()), None)


def _words_of(entry: Mapping[str, Any]) -> tuple[list[str], str]:
    """Return the words before the group of an entry of a defaults list, such as `optional`, and the group."""
    words = str(next(iter(entry))).split()
    known = [word for word in words[:-1] if word in ("optional", "override")]
    return known, " ".join(words[len(known) :]).strip("/")


def _group_entry(entry: dict[str, Any], where: str) -> tuple[str, Choice]:
    choice = next(iter(entry.values()))
    group = _words_of(entry)[1]
    if group == "stack":
        choice = [] if choice is None else [choice] if isinstance(choice, str) else choice
        if not (isinstance(choice, list) and all(isinstance(c, str) for c in choice)):
            raise RecipeError(f"{where}: stack is a list of methods, such as [nf4, lora]; got {choice!r:.60}")
        repeated = {c for c in choice if choice.count(c) > 1}
        if repeated:
            raise RecipeError(
                f"{where}: '{sorted(repeated)[0]}' is listed twice; name the second one: "
                f"`stack: {{second: {{kind: {sorted(repeated)[0]}}}}}`"
            )
    elif choice is not None and not isinstance(choice, str):
        raise RecipeError(f"{where}: {group} is one name; got {choice!r:.60}")
    return group, choice


def _implied(source: YamlFile) -> list[Any]:
    """Return a defaults list for a file without one, such as a run's recipe.yaml: base, and the kinds its body names."""
    entries: list[Any] = ["/base"]
    for group in COMPONENT_GROUPS:
        body = source.value.get(group)
        if group != "stack" and isinstance(body, dict) and isinstance(body.get("kind"), str):
            entries.append({f"override /{group}": body["kind"]})
    return [*entries, "_self_"]


def _check_body(source: YamlFile) -> None:
    """Refuse an empty section: YAML reads it as null, and the keys meant for it are lost."""
    for key, value in source.value.items():
        if value is None and key in {*GROUPS, "tokenizer", "roles", "eval", "save", "log", "run", "batch"}:
            raise RecipeError(
                f"{source.where(key)}: '{dotted((key,))}' is empty; remove the line or put its keys below it, indented"
            )
        if key == "hydra":
            raise RecipeError(f"{source.where(key)}: there is no key 'hydra' in a recipe")
