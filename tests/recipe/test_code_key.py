"""The code of plugins in the keys of results: changed code is another result, and nothing else about a package counts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmrecipe.core import registry
from llmrecipe.core.errors import RunError
from llmrecipe.feedback.judges.labeller import build_judge
from llmrecipe.recipe.code_key import code_behind, code_of
from llmrecipe.recipe.compose import compose
from llmrecipe.recipe.content_key import content_key
from llmrecipe.recipe.pipeline_plan import plan

FILES = {
    "__init__.py": "",
    "scores.py": "from llmrecipe.plugin import reward_function\nfrom keyed_plugin.words import GOOD\n\n\n"
    "@reward_function\ndef keyed_score(text):\n    return float(len(text) in GOOD)\n",
    "words.py": "GOOD = (1, 2)\n",
    "voice.py": "from llmrecipe.plugin import judge_rule\n\n\n@judge_rule\ndef keyed_voice(ask, options):\n"
    "    return [3.0, 1.0] if options else 'well'\n",
    "keyed_metric.py": "from llmrecipe.plugin import Metric, register\n\n\n"
    "@register\nclass KeyedMetric(Metric):\n    def score(self, prediction, reference):\n        return 1.0\n",
    "keyed_lora.py": "from llmrecipe.plugin import Wrapper, register\n\n\n@register\nclass KeyedLora(Wrapper):\n    pass\n",
    "keyed_loss.py": "from llmrecipe.plugin import Objective, register\n\n\n@register\nclass KeyedLoss(Objective):\n    pass\n",
    "keyed_judge.py": "from llmrecipe.plugin import Judge, register\n\n\n@register\nclass KeyedJudge(Judge):\n    pass\n",
}
USES: list[dict[str, Any]] = [
    {"objective": {"reward": {"mine": {"kind": "function", "function": "keyed_score"}}}},
    {"judge": {"kind": "rule", "rule": "keyed_voice"}},
    {"truth": "keyed_voice"},
    {"eval": {"metrics": ["exact_match", "keyed_metric"]}},
    {"stack": {"lora": {"kind": "keyed_lora"}}},
    {"objective": {"kind": "keyed_loss"}},
    {"objective": {"reward": {"judge": {"judge": {"kind": "keyed_judge"}}}}},
    {"plugins": ["keyed_plugin"]},
]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An installed package with one component of several kinds."""
    from llmrecipe.feedback.judges.rule import RULES
    from llmrecipe.feedback.rewards.function import FUNCTIONS

    folder = tmp_path / "site" / "keyed_plugin"
    folder.mkdir(parents=True)
    for name, text in FILES.items():
        (folder / name).write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.setattr(registry, "_plugins", [])
    registry.add_plugin("keyed_plugin")
    yield folder
    registry._index.cache_clear()
    for table, name in ((RULES, "keyed_voice"), (FUNCTIONS, "keyed_score")):
        table.pop(name, None)
    for name in [n for n in sys.modules if n.partition(".")[0] == "keyed_plugin"]:
        del sys.modules[name]


@pytest.mark.parametrize("mapping", USES, ids=lambda m: "-".join(m))
def test_changed_code_of_a_component_is_another_key(mapping: dict[str, Any], package: Path) -> None:
    before = content_key(mapping, {})
    words = package / "words.py"
    words.write_text("GOOD = (1, 3)\n", encoding="utf-8")  # what the component's own file imports counts as well
    changed = content_key(mapping, {})
    assert changed != before
    words.write_text(FILES["words.py"], encoding="utf-8")
    assert content_key(mapping, {}) == before
    (package / "more.txt").write_text("a word", encoding="utf-8")
    assert content_key(mapping, {}) != before


def test_times_places_and_caches_change_nothing(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = content_key(USES[0], {})
    os.utime(package / "words.py", ns=(1, 1))
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "words.cpython-311.pyc").write_bytes(b"x")
    (package / ".words.py.swp").write_bytes(b"x")
    assert content_key(USES[0], {}) == before
    shutil.copytree(package, tmp_path / "other" / "keyed_plugin")
    monkeypatch.setattr(registry, "_plugins", [("keyed_plugin", tmp_path / "other" / "keyed_plugin")])
    assert content_key(USES[0], {}) == before


def test_a_package_that_a_recipe_does_not_use_is_no_part_of_its_key(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mapping = compose("sft_lora").mapping
    assert code_of(mapping) == {}
    before = content_key(mapping, {})
    monkeypatch.setattr(registry, "_plugins", [])
    assert content_key(mapping, {}) == before


def test_a_marked_function_of_a_script_is_known_with_what_it_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_rules: None
) -> None:
    script = "from llmrecipe.plugin import judge_rule\nimport beside_it\n\n\n"
    script += "@judge_rule\ndef of_a_script(ask, options):\n"
    (tmp_path / "a_script.py").write_text(script + "    return [1.0, 1.0]\n")
    (tmp_path / "beside_it.py").write_text("x = 1\n")
    (tmp_path / "unrelated.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    __import__("a_script")
    try:
        mapping = {"judge": {"kind": "rule", "rule": "of_a_script"}}
        before = content_key(mapping, {}), build_judge("rule", "judge").identity
        identity = build_judge(mapping["judge"], "judge").identity
        assert list(code_of(mapping)) == ["a_script"] and identity.startswith("rule:of_a_script:0.9:")
        (tmp_path / "unrelated.py").write_text("x = 2\n")
        assert content_key(mapping, {}) == before[0]
        (tmp_path / "beside_it.py").write_text("x = 2\n")
        assert content_key(mapping, {}) != before[0] and build_judge(mapping["judge"], "judge").identity != identity
        assert build_judge("rule", "judge").identity == before[1] == "rule:manners:0.9"
    finally:
        for name in ("a_script", "beside_it"):
            sys.modules.pop(name, None)


def test_code_behind_modules(package: Path) -> None:
    assert code_behind(["llmrecipe.methods.reparameterized.lora"]) == {}
    found = code_behind(["keyed_plugin.keyed_lora", "keyed_plugin"])
    assert list(found) == ["keyed_plugin"]
    (package / "keyed_lora.py").write_text(FILES["keyed_lora.py"] + "# another\n", encoding="utf-8")
    assert code_behind(["keyed_plugin.keyed_lora"]) != found


PIPELINE = """
plugins: [keyed_plugin]
stages:
  first: {recipe: sft_lora, steps: 1, data: {limit: 20}, batch: {size: 2}, eval: {batches: 1, test: false}}
  second:
    recipe: rl.yaml
    with: ["model.path=${stage:first}"]
"""
RL = """
defaults: [/rloo, _self_]
plugins: [keyed_plugin]
steps: 1
batch: {size: 2}
eval: {batches: 1, test: false}
objective: {max_new_tokens: 2, reward: {rule: null, mine: {kind: function, function: keyed_score}}}
"""


@pytest.fixture
def pipeline(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "two.yaml").write_text(PIPELINE, encoding="utf-8")
    (tmp_path / "rl.yaml").write_text(RL, encoding="utf-8")
    return package


def test_only_the_stages_that_open_a_plugin_have_another_folder(pipeline: Path) -> None:
    """The plugins of a pipeline are opened by all of its stages, those of a stage's recipe by that stage alone."""
    Path("one.yaml").write_text(PIPELINE.replace("plugins: [keyed_plugin]\n", ""), encoding="utf-8")
    before = {(name, s.name): s.key for name in ("one.yaml", "two.yaml") for s in plan(compose(name)).stages}
    (pipeline / "words.py").write_text("GOOD = (7,)\n", encoding="utf-8")
    after = {(name, s.name): s.key for name in ("one.yaml", "two.yaml") for s in plan(compose(name)).stages}
    assert [key for key in before if after[key] == before[key]] == [("one.yaml", "first")]


def test_code_changed_on_the_way_is_not_run_under_the_old_key(pipeline: Path) -> None:
    from llmrecipe.pipelines.run_stages import Pipeline, _started
    from llmrecipe.pipelines.subprocesses import Children, Machine

    command = "llmrecipe train recipe=two.yaml"
    made = Pipeline(plan(compose("two.yaml")), command, Children(Machine(1, (), 1)))
    (pipeline / "words.py").write_text("GOOD = (7,)\n", encoding="utf-8")
    with pytest.raises(RunError, match=r"stage second: the code of keyed_plugin was changed .*\n.*train recipe=two\.yaml"):
        _started(made, made.plan["second"], None)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_changed_reward_is_trained_anew_by_the_command(pipeline: Path, tmp_path: Path) -> None:
    """The stage that opens the plugin in its own recipe, and no other."""
    (tmp_path / "one.yaml").write_text(PIPELINE.replace("plugins: [keyed_plugin]\n", ""), encoding="utf-8")

    def run() -> str:
        environment = {**os.environ, "PYTHONPATH": str(pipeline.parent)}
        command = [str(Path(sys.executable).with_name("llmrecipe")), "train", "recipe=one.yaml", "log.live=off"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def folders() -> set[str]:
        return {p.name for p in (tmp_path / "runs" / "one").iterdir() if p.is_dir()}

    run()
    made = folders()
    assert len(made) == 2
    again = run()
    assert "[first] reused:" in again and "[second] reused:" in again and folders() == made
    text = FILES["scores.py"].replace("float(len(text) in GOOD)", "float(len(text))")
    (pipeline / "scores.py").write_text(text, encoding="utf-8")
    changed = run()
    assert "[first] reused:" in changed and "[second] reused:" not in changed
    assert len(folders() - made) == 1
