"""Composition: search, extension, overrides, the ordered stack, origins, residue."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from llmrecipe.core import registry
from llmrecipe.core.errors import RecipeError
from llmrecipe.recipe.compose import compose, to_yaml
from llmrecipe.recipe.explain import explain
from llmrecipe.recipe.recipe_paths import all_recipes

Project = Callable[..., Path]


def refusal(recipe: str | Path, *words: str) -> str:
    with pytest.raises(RecipeError) as caught:
        compose(recipe, list(words))
    message = str(caught.value)
    assert "append to your config" not in message and "Traceback" not in message
    return message


# --- search -----------------------------------------------------------------------------------------------------------


def test_base_chooses_the_documented_components() -> None:
    recipe = compose("base").recipe
    assert recipe.objective["kind"] == "sft"
    assert recipe.stack == {}
    assert recipe.optim["kind"] == "adamw"
    assert recipe.schedule["kind"] == "cosine"


def test_a_local_recipe_wins_over_a_packaged_one_and_may_extend_it(project: Project) -> None:
    project("recipes/dpo_lora.yaml", "defaults: [/dpo_lora]\noptim: {lr: 0.125}\n")
    composition = compose("dpo_lora")
    assert composition.path.parent.name == "recipes"
    assert composition.recipe.optim["lr"] == 0.125
    assert composition.recipe.objective["kind"] == "dpo"
    assert list(composition.recipe.stack) == ["lora"]


def test_a_path_works_from_anywhere(project: Project) -> None:
    path = project("far/away/mine.yaml", "defaults: [/sft]\nseed: 7\n")
    assert compose(path).recipe.seed == 7
    assert compose("far/away/mine.yaml").name == "mine"


def test_a_recipe_in_a_folder_is_found_by_stem_and_by_folder(project: Project) -> None:
    project("recipes/deep/er/mine.yaml", "seed: 3\n")
    assert compose("mine").recipe.seed == compose("deep/er/mine").recipe.seed == 3


def test_two_recipes_of_one_stem_are_refused_by_name(project: Project) -> None:
    project("recipes/a/twin.yaml", "seed: 1\n")
    project("recipes/b/twin.yaml", "seed: 2\n")
    message = refusal("twin")
    assert "recipes/a/twin.yaml" in message and "recipes/b/twin.yaml" in message
    assert compose("b/twin").recipe.seed == 2


@pytest.mark.parametrize("word", ["dpo_loar", "dpolora", "alignment/dpo_lra"])
def test_an_unknown_recipe_names_the_nearest(word: str) -> None:
    assert "did you mean 'dpo_lora'?" in refusal(word)


def test_a_missing_file_says_where_it_looked() -> None:
    assert "no such file" in refusal("./nowhere.yaml")


@pytest.mark.parametrize("given", [{"steps": 3}, 5, None])
def test_what_is_no_recipe_is_told_what_comes_first(given: object) -> None:
    with pytest.raises(RecipeError, match=r"compose: the first argument is a recipe by name, file or run directory.*; got"):
        compose(given)  # type: ignore[arg-type]


@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.slow) for part in range(1, 4))])
def test_every_packaged_recipe_composes(part: int) -> None:
    broken = {}
    for name in sorted(all_recipes())[part::4]:
        try:
            notes = compose(name).notes
            if notes:
                broken[name] = str(notes)
        except RecipeError as error:
            broken[name] = str(error)
    assert not broken


# --- extension --------------------------------------------------------------------------------------------------------


def test_a_recipe_outside_extends_its_neighbours_and_packaged_ones_but_nothing_below(project: Project, tmp_path: Path) -> None:
    """Such a file may be in somebody's home folder, with other projects and their recipes below."""
    home = tmp_path / "home"
    for folder in ("one", "two"):
        (home / folder / "recipes").mkdir(parents=True)
        (home / folder / "recipes" / "base.yaml").write_text("seed: 5\n")
    (home / "house.yaml").write_text("defaults: [/base, _self_]\nseed: 3\n")
    (home / "mine.yaml").write_text("defaults: [/house, _self_]\nsteps: 2\n")
    made = compose(str(home / "mine.yaml"), ["data.path=builtin:sft"]).recipe
    assert (made.seed, made.steps, made.objective["kind"]) == (3, 2, "sft")


def test_a_recipe_extends_another_and_the_outer_one_wins(project: Project) -> None:
    project(
        "recipes/family/parent.yaml", "defaults: [/base, override /objective: dpo]\nobjective: {beta: 0.3}\nseed: 1\nsteps: 5\n"
    )
    project("recipes/child.yaml", "defaults: [/parent, override /optim: lion, _self_]\nseed: 2\n")
    recipe = compose("child").recipe
    assert (recipe.seed, recipe.steps, recipe.objective["beta"], recipe.optim["kind"]) == (2, 5, 0.3, "lion")


def test_a_file_without_defaults_list_stands_on_base_and_names_kinds_in_its_body(project: Project) -> None:
    path = project("plain.yaml", "objective: {kind: dpo, beta: 0.2}\nstack: {low: {kind: lora, r: 2}, high: {kind: lora}}\n")
    recipe = compose(path).recipe
    assert recipe.objective["beta"] == 0.2
    assert [(n, w["r"]) for n, w in recipe.stack.items()] == [("low", 2), ("high", 8)]


def test_a_preset_chosen_further_out_wins_over_the_body_further_in(project: Project) -> None:
    project("recipes/data/mine.yaml", "path: mine.jsonl\nmax_length: 99\n")
    project("recipes/inner.yaml", "data: {path: inner.jsonl, limit: 4}\n")
    project("recipes/outer.yaml", "defaults: [/inner, override /data: mine]\ndata: {max_length: 11}\n")
    inner, outer = compose("inner", ["data=mine"]).recipe.data, compose("outer").recipe.data
    assert (inner.path, inner.max_length, inner.limit) == ("mine.jsonl", 99, 4)
    assert (outer.path, outer.max_length, outer.limit) == ("mine.jsonl", 11, 4)


def test_an_optimizer_preset_and_a_component_replace_each_other(project: Project) -> None:
    project("recipes/optim/heavy.yaml", "kind: adamw\nbeta2: 0.5\n")
    project("recipes/inner.yaml", "defaults: [/base, override /optim: heavy]\noptim: {beta1: 0.25}\n")
    assert compose("inner").recipe.optim["beta2"] == 0.5
    swapped = compose("inner", ["optim=sgd"])
    assert swapped.recipe.optim["kind"] == "sgd"
    assert "beta2" not in swapped.recipe.optim
    assert any("optim.beta1" in note for note in swapped.notes)


def test_a_circle_of_recipes_is_named(project: Project) -> None:
    project("recipes/one.yaml", "defaults: [/two]\n")
    project("recipes/two.yaml", "defaults: [/one]\n")
    message = refusal("one")
    assert "circle" in message and "one.yaml -> " in message.replace("recipes/", "") and "two.yaml" in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("defaults: [/bse]\n", "did you mean 'base'?"),
        ("defaults: [{override /objectiv: dpo}]\n", "did you mean 'objective'?"),
        ("defaults: [override /objective: dpoo]\n", "did you mean 'dpo'?"),
        ("defaults: [override /stack: [lroa]]\n", "did you mean 'lora'?"),
        ("defaults: [override /stack: [lora, lora]]\n", "is listed twice"),
        ("defaults: [override /stack: {lora: {r: 8}}]\n", "stack is a list"),
        ("run: {name: '${nope'}\n", "without a closing brace"),
        ("defaults: base\n", "defaults is a list"),
        ("defaults: [3]\n", "an entry of defaults is"),
        ("model:\n", "'model' is empty"),
        ("hydra: {run: {dir: x}}\n", "no key 'hydra'"),
        ("seed: 1\nseed: 2\n", "given twice (first on line 1)"),
        ("data: {path: a, path: b}\n", "'data.path' is given twice"),
        ("model: [unclosed\n", "not valid YAML"),
        ("model:\n\tpath: x\n", "spaces, never tabs"),
        ("- a\n- b\n", "a recipe is a mapping"),
        ("seed:1\n", "a recipe is a mapping"),
        ("a: &x [*x]\n", "contains itself"),
        ("a: !!python/object/apply:os.system [ls]\n", "not valid YAML"),
        ("plugins: [no_such_package_anywhere]\n", "no installed package is called 'no_such_package_anywhere'"),
    ],
)
def test_a_broken_file_is_one_clear_message_with_its_name(project: Project, text: str, expected: str) -> None:
    path = project("broken.yaml", text)
    message = refusal(path)
    assert expected in message
    assert "broken.yaml" in message or "plugins" in message


# --- overrides --------------------------------------------------------------------------------------------------------


def test_the_stack_keeps_the_order_it_was_given() -> None:
    assert list(compose("sft", ["stack=[nf4,lora]"]).recipe.stack) == ["nf4", "lora"]
    assert list(compose("sft", ["stack=[lora,nf4]"]).recipe.stack) == ["lora", "nf4"]
    assert list(compose("sft", ["stack=lora"]).recipe.stack) == ["lora"]
    assert compose("sft_lora", ["stack=[]"]).recipe.stack == {}


def test_entries_are_changed_removed_and_added() -> None:
    words = ["stack=[nf4,lora]", "stack.lora.r=3", '+stack.top={kind: lora, target: "layers.-4:.mlp"}', "~stack.nf4"]
    stack = compose("sft", words).recipe.stack
    assert list(stack) == ["lora", "top"]
    assert stack["lora"]["r"] == 3
    assert stack["top"]["target"] == "layers.-4:.mlp"
    assert stack["top"]["r"] == 8, "a new entry gets its kind's defaults"


def test_a_new_entry_named_like_its_kind_needs_no_kind() -> None:
    assert compose("sft", ["+stack.lora={r: 2}"]).recipe.stack["lora"]["kind"] == "lora"


def test_a_mapping_given_for_an_option_replaces_it(project: Project) -> None:
    path = project("mix.yaml", "data: {path: {a.jsonl: 0.5, b.jsonl: 0.5}}\n")
    assert compose(path, ["data.path={c.jsonl: 1.0}"]).recipe.data.path == {"c.jsonl": 1.0}


def test_a_mapping_given_for_a_section_adds_to_it(project: Project) -> None:
    path = project("plain.yaml", "data: {path: a.jsonl, limit: 3}\n")
    data = compose(path, ["data={limit: 9}"]).recipe.data
    assert (data.path, data.limit) == ("a.jsonl", 9)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("optim.lrr=1", "optim.lrr: adamw has no option 'lrr'; did you mean 'lr'?"),
        ("+optim.lrr=1", "did you mean 'lr'?"),
        ("++optim.lrr=1", "did you mean 'lr'?"),
        ("otpim.lr=1", "did you mean 'optim'?"),
        ("stack.lora.rr=1", "stack.lora.rr: lora has no option 'rr'; did you mean 'r'?"),
        ("stack.lroa.r=1", "did you mean 'lora'?"),
        ("~stack.lroa", "did you mean 'lora'?"),
        ("~stack.lora.kindd", "did you mean 'kind'?"),
        ("stack.nf4.double_quant=true", "stack=[lora, nf4]"),
        ("lr=1", "did you mean 'optim.lr'?"),
        ("max_length=9", "did you mean 'data.max_length'?"),
        ("optim=adamww", "did you mean 'adamw'?"),
        ("objective=", "objective"),
        ("model=Qwen/Qwen3-0.6B", "model.path=Qwen/Qwen3-0.6B"),
        ("optim.lr=abc", "must be a number; got 'abc'"),
        ("optim.lr=-1", "must be > 0; got -1"),
        ("stack.lora.r=0", "must be > 0; got 0"),
        ("stack.lora.r=8.0", "must be a whole number; got 8.0; write 8"),
        ("stack.lora.r=null", "must be a whole number"),
        ("optim.lr=[1", "'[' and ']' do not match"),
        ("optim.lr={a: 1", "'{' and '}' do not match"),
        ("optim.lr='1", "unclosed quote"),
        ("optim.lr", "key=value"),
        ("--typo", "options start with --"),
        ("optim.lr=1,2,3", "got several"),
        ("optim.lr=range(1,3)", "got several"),
        ("stack={lora: {r: 8}}", "takes a list of methods"),
        ("stack=[lora,lora]", "is listed twice"),
        ("seed.x=3", 'must be a whole number; got {"x": 3}'),
        ("hydra.run.dir=x", "cannot be set"),
        ("~objective", "cannot be removed"),
        ("data=5", "takes one name"),
        ("data.path=null data", "data.path"),
        ("stack.lora=5", "must be a mapping"),
        ("data.path=5", "data.path: must be text or a list or a mapping; got 5 [override data.path=5]"),
        ("plugins=5", "plugins: must be a list; got 5 [override plugins=5]"),
        ("seed=${nope", "do not match"),
        ("seed='${oc.env:HOME}'", "is not allowed"),
        ("seed='${seed}'", "circle"),
        ("seed='${sede}'", "did you mean 'seed'?"),
    ],
)
def test_a_wrong_word_is_one_clear_message(word: str, expected: str) -> None:
    if word == "data.path=null data":
        assert compose("sft_lora", [word]).recipe.data.path == "null data"
        return
    assert expected in refusal("sft_lora", word)


def test_all_mistakes_are_listed_together_with_their_origin(project: Project) -> None:
    path = project(
        "many.yaml",
        "defaults: [/sft, override /stack: [lora], _self_]\n"
        "stack: {lora: {rr: 4}}\noptim:\n  lr: fast\ndata: {pth: x}\nsede: 3\n",
    )
    lines = refusal(path, "batch.size=0", "optim.wd=1").splitlines()
    assert len(lines) == 6
    text = "\n".join(lines)
    for key, origin in [
        ("stack.lora.rr", "many.yaml:2"),
        ("optim.lr", "many.yaml:4"),
        ("data.pth", "many.yaml:5"),
        ("sede", "many.yaml:6"),
        ("batch.size", "override batch.size=0"),
        ("optim.wd", "override optim.wd=1"),
    ]:
        assert any(line.startswith(f"{key}: ") and line.endswith(f"[{origin}]") for line in lines), (key, text)


# --- interpolation ----------------------------------------------------------------------------------------------------


def test_plain_paths_resolve_and_stages_stay(project: Project) -> None:
    path = project(
        "refs.yaml",
        'seed: 4\nsteps: "${seed}"\nmodel: {path: "${stage:sft}"}\nrun: {name: "s${seed}-x"}\nlog: {every: "${save.keep}"}\n',
    )
    composition = compose(path)
    recipe = composition.recipe
    assert (recipe.steps, recipe.run.name, recipe.log.every) == (4, "s4-x", 2)
    assert recipe.model.path == "${stage:sft}"


def test_escaped_dollars_are_text_and_survive_writing(project: Project) -> None:
    path = project("dollar.yaml", "data: {system: 'cost \\${x}'}\n")
    composition = compose(path)
    assert composition.recipe.data.system == "cost ${x}"
    again = compose(project("again.yaml", to_yaml(composition.mapping)))
    assert again.recipe.data.system == "cost ${x}"


# --- residue ----------------------------------------------------------------------------------------------------------


def test_values_of_a_replaced_objective_are_dropped_with_one_line(project: Project) -> None:
    path = project("mine.yaml", "defaults: [/base, override /objective: dpo, _self_]\nobjective: {beta: 0.3}\n")
    composition = compose(path, ["objective=sft"])
    assert "beta" not in composition.recipe.objective
    assert len(composition.notes) == 1
    assert "objective.beta" in composition.notes[0] and "mine.yaml:2" in composition.notes[0] and "dpo" in composition.notes[0]


def test_a_key_no_kind_knows_is_refused_even_when_the_kind_was_replaced(project: Project) -> None:
    path = project("mine.yaml", "defaults: [/base, override /objective: dpo, _self_]\nobjective: {betta: 0.3}\n")
    assert "objective.betta" in refusal(path, "objective=sft")


def test_a_key_of_another_kind_is_refused_where_nothing_was_replaced(project: Project) -> None:
    path = project("mine.yaml", "defaults: [/base, override /objective: dpo, _self_]\nobjective: {mask: all}\n")
    assert "dpo has no option 'mask'" in refusal(path)


def test_options_of_a_method_taken_out_are_dropped(project: Project) -> None:
    for words in (["stack=[bitfit]"], ["stack=[]"]):
        composition = compose("sft_lora", words)
        assert "lora" not in composition.recipe.stack
        assert len(composition.notes) == 1 and "stack.lora" in composition.notes[0]
    project("recipes/child.yaml", "defaults: [/sft_lora, override /stack: [bitfit]]\n")
    composition = compose("child")
    assert list(composition.recipe.stack) == ["bitfit"] and composition.notes


def test_a_value_is_kept_where_the_option_means_the_same_in_both_kinds(project: Project) -> None:
    path = project("mine.yaml", "optim: {lr: 0.5, clip: 3.0}\n")
    paged = compose(path, ["optim=paged_adamw"])
    assert (paged.recipe.optim["lr"], paged.recipe.optim["clip"], paged.notes) == (0.5, 3.0, [])
    lion = compose(path, ["optim=lion"])
    assert lion.recipe.optim["clip"] == 3.0
    assert lion.recipe.optim["lr"] == registry.spec("optim", "lion").defaults()["lr"], "Lion's steps have another scale"
    assert len(lion.notes) == 1 and "optim.lr" in lion.notes[0]


def test_an_override_meant_for_the_replaced_kind_is_refused_not_dropped() -> None:
    assert "sft has no option 'beta'" in refusal("dpo", "objective=sft", "objective.beta=0.2")


def test_defaults_are_those_of_the_chosen_kind_when_the_body_names_it(project: Project) -> None:
    path = project("mine.yaml", "defaults: [/base, _self_]\noptim: {kind: sgd, lr: 0.5}\n")
    named = compose(path).recipe.optim
    chosen = compose("base", ["optim=sgd", "optim.lr=0.5"]).recipe.optim
    assert named == chosen


def test_a_choice_further_out_wins_over_a_kind_in_a_body_further_in(project: Project) -> None:
    project("recipes/inner.yaml", "objective: {kind: dpo, beta: 0.2}\n")
    project("recipes/outer.yaml", "defaults: [/inner, override /objective: sft]\n")
    composition = compose("outer")
    assert composition.recipe.objective["kind"] == "sft"
    assert "beta" not in composition.recipe.objective and "objective.beta" in composition.notes[0]


# --- the composed recipe is a recipe ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", [[], ["stack=[nf4,lora]", "+stack.top={kind: lora, r: 2}", "run.name=on", "model.revision='1e5'"]]
)
def test_a_composed_recipe_written_down_is_the_same_recipe(project: Project, words: list[str]) -> None:
    first = compose("dpo_lora", words)
    path = project("runs/dpo_lora/20260101-abc/recipe.yaml", to_yaml(first.mapping))
    again = compose(path.parent)
    assert again.mapping == first.mapping
    assert list(again.recipe.stack) == list(first.recipe.stack)
    assert again.recipe == first.recipe
    assert again.name == first.name
    assert compose(path.parent, ["objective=sft"]).recipe.objective["kind"] == "sft"
    assert list(compose(path.parent, ["stack=[bitfit]"]).recipe.stack) == ["bitfit"]


# --- origins ----------------------------------------------------------------------------------------------------------


def test_explain_gives_every_value_its_origin(project: Project) -> None:
    project(
        "recipes/mine.yaml",
        "defaults:\n  - /base\n  - override /stack: [lora]\n  - _self_\nstack:\n  lora:\n    r: 16\nseed: 3\n",
    )
    composition = compose("mine", ["optim.lr=1e-3", "schedule=linear", "+stack.top={kind: lora}"])
    origins = {".".join(map(str, line.key)): line for line in explain(composition)}
    assert str(origins["stack.lora.r"].origin) == "recipes/mine.yaml:7"
    assert str(origins["stack.lora.kind"].origin) == "recipes/mine.yaml:3"
    assert str(origins["seed"].origin) == "recipes/mine.yaml:8"
    assert str(origins["optim.lr"].origin) == "override optim.lr=1e-3"
    assert str(origins["schedule.kind"].origin) == "override schedule=linear"
    assert str(origins["stack.top.kind"].origin) == "override +stack.top={kind: lora}"
    for key, text in [
        ("stack.top.alpha", "alpha:"),
        ("optim.eps", "eps:"),
        ("batch.size", "size:"),
        ("model.continue", "continue_:"),
    ]:
        origin = origins[key].origin
        assert origin.kind == "default"
        assert origin.file is not None
        assert origin.file.read_text(encoding="utf-8").splitlines()[origin.line - 1].strip().startswith(text), key
    assert len(origins) == len(explain(composition))
