"""A package of a stranger that imports from `llmrecipe.plugin` alone, used through recipes and verbs."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, BloomConfig, BloomForCausalLM

from llmrecipe import plugin
from llmrecipe.cli.app import run_command as command
from llmrecipe.core import registry
from llmrecipe.core.errors import ModelError, RecipeError, UserError
from llmrecipe.core.paths import PACKAGE
from llmrecipe.data import prepare, tokenize_split
from llmrecipe.data.tokenize.chat_templates import set_template
from llmrecipe.interop.adapter_hub.hub_layout import hub_place
from llmrecipe.interop.load_run import open_run
from llmrecipe.interop.merge_options import MergeConfig
from llmrecipe.models.checkpoint_path import TINY
from llmrecipe.models.family import part_names_of
from llmrecipe.recipe.compose import compose
from llmrecipe.recipe.data_section import DataSection
from llmrecipe.recipe.jsonschema import json_schema
from tests.interop.saved_runs import VOCABULARY
from tests.pipelines import contract
from tests.trainings import events, learned, train_recipe

NAMES = [
    "Adapter",
    "AdapterFormat",
    "Anatomy",
    "Annotated",
    "Answer",
    "Ask",
    "BadRow",
    "Batch",
    "Bench",
    "Branch",
    "ChatTemplate",
    "ClassVar",
    "Conversion",
    "DataError",
    "DataFormat",
    "Encoded",
    "Encoder",
    "Family",
    "Field",
    "Fraction",
    "Hook",
    "HubLayout",
    "Item",
    "Judge",
    "Largest",
    "Layer",
    "Limit",
    "Literal",
    "Loss",
    "LossMask",
    "LossMaskName",
    "Measured",
    "Measures",
    "MergeMethod",
    "Metric",
    "ModelError",
    "NonNegativeFloat",
    "NonNegativeInt",
    "NotApplicable",
    "Objective",
    "OpenFraction",
    "OpenTracker",
    "Optimizer",
    "ParamGroup",
    "PartNames",
    "PositiveFloat",
    "PositiveFraction",
    "PositiveInt",
    "Probe",
    "RecipeError",
    "RefSync",
    "Report",
    "Reward",
    "Roles",
    "Row",
    "RowType",
    "RunError",
    "Schedule",
    "Sequence",
    "SharedModule",
    "Site",
    "Smallest",
    "Stage",
    "Step",
    "TOKEN_METRICS",
    "Tracker",
    "Truncation",
    "UserError",
    "Verification",
    "Wrapper",
    "add_hook",
    "add_shared",
    "add_to_weight",
    "anatomy",
    "collate_tokens",
    "device_of",
    "encode_answers",
    "encode_prompts",
    "encode_sequences",
    "filled_text",
    "judge_rule",
    "label_of",
    "merge_hooks",
    "options",
    "peft_converter",
    "prompt_answers",
    "register",
    "reward_function",
    "shared_modules",
    "text_of",
    "token_loss",
]
"""Removing a name breaks plugins; adding one is a promise to keep it."""

FILES = {
    "__init__.py": "",
    "cards.py": '''
from llmrecipe.plugin import ClassVar, Conversion, DataFormat, Row, filled_text, prompt_answers, register


@register
class Cards(DataFormat):
    """Two sides of a card."""

    columns: ClassVar[tuple[tuple[str, ...], ...]] = (("front", "back"),)
    becomes: ClassVar[dict[str, int]] = {"dialogue": 35}
    example: ClassVar[str] = '{"front": "blue", "back": "bleu"}'

    def convert(self, row: Row, conversion: Conversion) -> list[Row]:
        card = {"prompt": filled_text(row, "front") + " = ", "completion": row["back"]}
        return [prompt_answers(card, ("completion",), conversion)]
''',
    "reversed_text.py": '''
from llmrecipe.plugin import ClassVar, Encoder, Item, Report, RowType, register


@register
class ReversedText(RowType):
    """Documents read from the end."""

    lists: ClassVar[tuple[str, ...]] = ("ids",)
    masks: ClassVar[tuple[str, ...]] = ("trained",)
    takes: ClassVar[dict[str, int]] = {"text": 10}

    def encode(self, encoder: Encoder, items: list[Item], report: Report) -> None:
        for item, ids in zip(items, encoder.tokens.raw([i.row["text"] for i in items]), strict=True):
            report.tokens += len(ids)
            item.done.append({"ids": ids[::-1], "trained": [0] + [1] * (len(ids) - 1)})
''',
    "backwards.py": '''
from llmrecipe.plugin import ClassVar, Objective, collate_tokens, register, token_loss


@register
class Backwards(Objective):
    """L = -sum log p of what stands before."""

    rows: ClassVar[str] = "reversed_text"

    def loss_mask(self):
        return "all"

    def collate(self, rows, roles):
        return collate_tokens(rows, roles)

    def loss(self, batch, roles):
        return token_loss(batch, roles)
''',
    "bloom.py": '''
from llmrecipe.plugin import ClassVar, Family, PartNames, register


@register
class Bloom(Family):
    """Bloom."""

    model_types: ClassVar[tuple[str, ...]] = ("bloom",)
    parts: ClassVar[PartNames] = PartNames(
        stacks={"decoder": "h"},
        layer={
            "attn": "self_attention",
            "attn.qkv": "self_attention.query_key_value",
            "attn.o": "self_attention.dense",
            "mlp": "mlp",
            "mlp.up": "mlp.dense_h_to_4h",
            "mlp.down": "mlp.dense_4h_to_h",
            "norm.attn": "input_layernorm",
            "norm.mlp": "post_attention_layernorm",
        },
        top={"norm.final": "ln_f"},
        fused={"attn.qkv": "heads"},
    )
''',
    "every_other.py": '''
from llmrecipe.plugin import ClassVar, LossMask, register


@register
class EveryOther(LossMask):
    """The first, third, ... token after the prompt."""

    turns_of_prompted: ClassVar[bool] = False

    def spans(self, encoded):
        return [(i, i + 1) for i in range(encoded.answer, len(encoded.ids), 2)]
''',
    "keep_end.py": '''
from llmrecipe.plugin import Truncation, register


@register
class KeepEnd(Truncation):
    """The beginning is cut off, whatever stands there."""

    def sequence(self, ids, trained, limit, where, plain):
        return [(ids[-limit.length :], [0, *trained[len(ids) - limit.length + 1 :]])]
''',
    "shouted.py": '''
from llmrecipe.plugin import ChatTemplate, ClassVar, register


@register
class Shouted(ChatTemplate):
    """Turns in capital letters."""

    text: ClassVar[str] = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] | upper + eos_token }}"
        "{% endgeneration %}{% else %}{{ m['content'] | upper + ' ' }}{% endif %}{% endfor %}"
    )
''',
    "bloom_places.py": '''
from llmrecipe.plugin import ClassVar, HubLayout, register


@register
class BloomPlaces(HubLayout):
    """Bloom."""

    model_types: ClassVar[tuple[str, ...]] = ("bloom",)
    places: ClassVar[dict[str, str]] = {"attn": "attn_side", "ffn": "mlp_side"}
''',
    "shortened.py": '''
from llmrecipe.plugin import ClassVar, PositiveInt, Step, register


@register
class Shortened(Step):
    """The first prompts of a set, answered with their first word."""

    gives: ClassVar[str] = "rows"
    needs: ClassVar[dict[str, str]] = {"prompts": "rows"}

    prompts: str
    """Rows with prompts."""
    count: PositiveInt = 3
    """Number of rows."""

    def example(self):
        return {"train": [{"prompt": "one two", "completion": "one"}] * self.count}

    def run(self, work):
        rows = self.example()["train"]
        return {"rows": work.write(rows)}
''',
    "first_only.py": '''
from llmrecipe.plugin import ClassVar, MergeMethod, PositiveFloat, register


@register
class FirstOnly(MergeMethod):
    """gain w_1 t_1."""

    on: ClassVar[str] = "changes"

    gain: PositiveFloat
    """Multiplies the change."""

    def merge(self, tensors, weights, generator):
        return self.gain * weights[0] * tensors[0]
''',
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The package, installed and known to nobody until a recipe names it."""
    folder = tmp_path / "site" / "stranger"
    folder.mkdir(parents=True)
    for name, text in FILES.items():
        (folder / name).write_text(("from __future__ import annotations\n" + text) if text else "", encoding="utf-8")
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.setattr(registry, "_plugins", [])
    registry._index.cache_clear()
    yield folder
    registry._index.cache_clear()
    for name in [n for n in sys.modules if n.partition(".")[0] == "stranger"]:
        del sys.modules[name]


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a fresh process that knows no plugin."""
    monkeypatch.setattr(registry, "_plugins", [])
    registry._index.cache_clear()


def bloom_folder(folder: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=16, n_layer=1, n_head=2)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_names_are_pinned_and_each_is_what_type_checkers_see() -> None:
    assert plugin.__all__ == NAMES and all(getattr(plugin, name) is not None for name in NAMES)
    tree = ast.parse((PACKAGE / "plugin.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {a.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for a in node.names}
    assert seen == plugin._MODULES
    assert set(registry.INTERFACES) <= set(NAMES)
    with pytest.raises(AttributeError, match="no attribute 'DataFormatt'; did you mean 'DataFormat'"):
        plugin.DataFormatt  # noqa: B018


def test_importing_it_and_its_light_names_imports_no_torch() -> None:
    code = "import sys; from llmrecipe.plugin import ClassVar, DataFormat, Family, RowType, register\n"
    code += "assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_format_a_family_and_a_merge_method_work_through_a_recipe_and_export(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base, cards, run = bloom_folder(tmp_path / "base"), tmp_path / "cards.jsonl", tmp_path / "run"
    cards.write_text("".join(json.dumps({"front": f, "back": b}) + "\n" for f, b in [("one", "un"), ("two", "deux")]))
    words = [f"model.path={base}", f"data.path={cards}", "data.validation=null", "steps=2", "batch.size=2"]
    words += ["stack.lora.target=attn.q|v", "stack.lora.r=2", "optim.lr=0.01"]
    with pytest.raises((ModelError, RecipeError), match=r"attn\.q"):
        train_recipe(tmp_path / "without", "sft_lora", *words, "data.columns={prompt: front, completion: back}")
    train_recipe(run, "sft_lora", *words, "plugins=[stranger]")
    assert json.loads((run / "report.json").read_text())["data"]["format"] == "cards"
    projection = "transformer.h.0.self_attention.query_key_value"
    assert set(learned(run)) == {f"{projection}.lora__{part}.{factor}" for part in "qv" for factor in "AB"}

    forget(monkeypatch)
    open_run(str(run))
    assert part_names_of("bloom") is not None, "a run names its plugins to whoever opens it"

    forget(monkeypatch)
    line = ["export", str(run), "--to", "merged", "--add", f"{run}=1.0", "--combine", "first_only"]
    assert command([*line, "--out", str(tmp_path / "bad"), "combine.gian=2.0"]) == 2
    assert "combine.gian: first_only has no such option; did you mean 'gain'?" in capsys.readouterr().err
    assert command([*line, "--out", str(tmp_path / "bad")]) == 2
    assert "combine.gain" in capsys.readouterr().err
    assert command([*line, "--out", str(tmp_path / "three"), "combine.gain=3.0"]) == 0
    assert command(["export", str(run), "--to", "merged", "--out", str(tmp_path / "one")]) == 0
    name = f"{projection}.weight"
    start, one, three = (
        BloomForCausalLM.from_pretrained(p).state_dict()[name] for p in (base, tmp_path / "one", tmp_path / "three")
    )
    assert (one - start).abs().max() > 1e-4
    torch.testing.assert_close(three - start, 3.0 * (one - start), atol=1e-6, rtol=1e-4)


def test_a_row_type_makes_the_rows_of_an_objective(package: Path, tmp_path: Path) -> None:
    """The loss of the first step is the mean negative log-likelihood of the texts read from the end."""
    base, text, run = bloom_folder(tmp_path / "base"), tmp_path / "text.jsonl", tmp_path / "run"
    texts = ["a fine harbour in snow", "two cards"]
    text.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    words = [f"model.path={base}", f"data.path={text}", "data.validation=null", "steps=1", "batch.size=2"]
    train_recipe(run, "sft", "objective=backwards", "plugins=[stranger]", *words)
    model, tokenizer = BloomForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    rows = [torch.tensor([tokenizer(t).input_ids[::-1]]) for t in texts]
    sums = [torch.nn.functional.cross_entropy(model(r).logits[0, :-1], r[0, 1:], reduction="sum") for r in rows]
    wanted = float(sum(sums)) / sum(r.shape[1] - 1 for r in rows)
    assert events(run)[0]["loss"] == pytest.approx(wanted, rel=1e-5)


def test_a_mask_a_truncation_and_a_template_make_token_rows(package: Path, tmp_path: Path) -> None:
    registry.add_plugin("stranger")
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "say it", "completion": "one two three"}) + "\n", encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    assert set_template(tokenizer, "shouted") is not None
    whole = tokenizer("SAY IT ONE TWO THREE" + tokenizer.eos_token, add_special_tokens=False).input_ids
    prompt = tokenizer("SAY IT ", add_special_tokens=False).input_ids
    start = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(prompt))
    section = DataSection(path=str(path), cache=False)
    row = one_row(section, tokenizer, "every_other")
    assert row["ids"] == whole and row["trained"] == [int(i >= start and (i - start) % 2 == 0) for i in range(len(whole))]
    cut = one_row(section.model_copy(update={"max_length": 4, "truncation": "keep_end"}), tokenizer, "completion")
    assert cut["ids"] == whole[-4:] and cut["trained"] == [0, 1, 1, 1]
    assert len(tokenize_split.plugin_code()) == 1, "token tables depend on the plugin's code"


def one_row(section: DataSection, tokenizer: Any, mask: str) -> dict[str, Any]:
    found = prepare(section, tokenizer, "dialogue", mask=mask, seed=0)
    assert found is not None
    (row,) = found
    return row


def test_the_names_a_recipe_may_hold_include_those_of_a_plugin(
    package: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused with the nearest spelling, accepted in a recipe that names the plugin, listed by schema and show."""
    wrong = {
        "objective.mask": ("every_othr", "loss_mask", "every_other"),
        "data.truncation": ("keep_nd", "truncation", "keep_end"),
        "data.format": ("crds", "format", "cards"),
        "eval.metrics": ("[exact_mach]", "metric", "exact_match"),
        "log.trackers": ("[wanb]", "tracker", "wandb"),
    }
    for key, (given, group, near) in wrong.items():
        told = rf"{key}: there is no {group} '{given.strip('[]')}'; did you mean '{near}'\?"
        with pytest.raises(RecipeError, match=told):
            compose("sft_lora", ["plugins=[stranger]", f"{key}={given}"])
    words = ["objective.mask=every_other", "data.truncation=keep_end", "data.format=cards"]
    assert compose("sft_lora", ["plugins=[stranger]", *words]).recipe.data.truncation == "keep_end"
    schema = json_schema()
    options = schema["$defs"]["objective.sft"]["properties"]["mask"]["anyOf"][0]
    assert {"every_other", "completion", "last"} < set(options["enum"])
    assert "keep_end" in schema["$defs"]["DataSection"]["properties"]["truncation"]["anyOf"][0]["enum"]
    assert "registered" not in json.dumps(schema)
    assert command(["show", "data"]) == 0
    assert "keep_end" in capsys.readouterr().out
    forget(monkeypatch)
    with pytest.raises(RecipeError, match="there is no loss_mask 'every_other'"):
        compose("sft_lora", ["objective.mask=every_other"])


def test_a_step_of_a_plugin_keeps_the_promises_of_steps(package: Path, tmp_path: Path) -> None:
    registry.add_plugin("stranger")
    contract.test_options_are_explained_and_a_wrong_one_is_named("shortened", tmp_path)
    contract.test_what_it_needs_are_options_and_what_it_gives_is_known("shortened")
    (tmp_path / "dry").mkdir()
    contract.test_a_dry_run_has_what_later_trainings_need("shortened", tmp_path / "dry")
    contract.test_a_finished_step_is_reused("shortened", tmp_path)
    path = package / "shortened.py"
    path.write_text(
        path.read_text(encoding="utf-8").replace('"prompt": "one two", "completion": "one"', '"number": 1'), encoding="utf-8"
    )
    sys.modules.pop("stranger.shortened")
    (tmp_path / "wrong").mkdir()
    with pytest.raises(AssertionError, match="no row type can be made of the example rows"):
        contract.test_a_dry_run_has_what_later_trainings_need("shortened", tmp_path / "wrong")


def test_a_layout_of_a_plugin_says_where_the_hub_keeps_adapters(package: Path) -> None:
    with pytest.raises(ModelError, match=r"adapter-hub's names for bloom are not known here \(bart, bert, "):
        hub_place("bloom", "decoder", "ffn")
    registry.add_plugin("stranger")
    assert hub_place("bloom", "decoder", "ffn") == "mlp_side"
    assert [hub_place("t5", side, "ffn") for side in ("encoder", "decoder")] == ["layer.1", "layer.2"]
    assert [hub_place(kind, "decoder", "attn") for kind in ("gpt2", "roberta")] == ["attention_adapters", "attention.output"]


def test_two_families_for_one_model_type_are_refused(package: Path) -> None:
    registry.add_plugin("stranger")
    other = (package / "bloom.py").read_text(encoding="utf-8")
    (package / "bloom_again.py").write_text(other, encoding="utf-8")
    registry._index.cache_clear()
    with pytest.raises(ModelError, match=r"model type bloom belongs to several families: .*bloom\.py and .*bloom_again\.py"):
        part_names_of("bloom")


def test_the_lists_show_what_a_plugin_adds(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    registry.add_plugin("stranger")
    added = {"format": "cards", "row_type": "reversed_text", "family": "bloom", "merge_method": "first_only"}
    added |= {"loss_mask": "every_other", "truncation": "keep_end", "chat_template": "shouted", "hub_layout": "bloom_places"}
    for group, name in added.items():
        assert command(["list", group]) == 0
        assert f"{name} " in capsys.readouterr().out
    assert command(["show", "first_only"]) == 0
    assert "Multiplies the change." in capsys.readouterr().out


def test_options_of_a_merge_method_are_checked_before_weights_are_read() -> None:
    with pytest.raises(UserError, match=r"combine\.gain: ties has no such option \(it has none besides --density and --sign\)"):
        MergeConfig("ties", 0.5, more={"gain": 2.0}).check()
    with pytest.raises(UserError, match="it goes with dare_linear, dare_linear_svd, dare_ties, dare_ties_svd, magnitude_prune"):
        MergeConfig("svd", 0.5).check()
