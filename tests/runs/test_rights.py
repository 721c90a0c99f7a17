"""Rights are given by the person who opens: whatever a run, a stack, an adapter or a model folder says of them, nothing of its
code runs before the person's own word, and with it everything opens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from llmrecipe import load
from llmrecipe.cli.app import run_command as cli
from llmrecipe.core.errors import ModelError
from llmrecipe.models.checkpoint_path import TINY
from llmrecipe.models.load import load_model, load_tokenizer, skeleton
from llmrecipe.pipelines.run_stages import plan
from llmrecipe.pipelines.subprocesses import command_of
from llmrecipe.recipe.compose import compose
from llmrecipe.recipe.rights import RIGHTS
from llmrecipe.recipe.schema import ModelSection, TokenizerSection
from tests.trainings import QUIET

TRUST = "model.trust_remote_code=true"
WORDS = [
    "steps=2",
    "batch.size=1",
    "data.limit=4",
    "data.max_length=128",
    "eval.every=null",
    "save.every=1",
    "data.cache=false",
]
CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class Planted(LlamaConfig):
    model_type = "planted"
    def __init__(self, **values):
        open({mark!r}, "a").write("ran ")
        super().__init__(**values)

class PlantedLM(LlamaForCausalLM):
    config_class = Planted
"""


class Planted:
    """A finished run on a model folder with code of its own; everything in it says that the code may run."""

    def __init__(self, root: Path):
        self.mark, self.model, self.run = root / "mark", root / "model", root / "run"
        shutil.copytree(TINY, self.model)
        (self.model / "planted.py").write_text(CODE.format(mark=str(self.mark)))
        config = json.loads((self.model / "config.json").read_text())
        config |= {"model_type": "planted", "trust_remote_code": True}
        config |= {"auto_map": {"AutoConfig": "planted.Planted", "AutoModelForCausalLM": "planted.PlantedLM"}}
        (self.model / "config.json").write_text(json.dumps(config))
        words = ["recipe=sft_lora", f"model.path={self.model}", f"run.dir={self.run}", TRUST, *WORDS, *QUIET]
        assert cli(["train", *words]) == 0
        self.stored = yaml.safe_load((self.run / "final" / "stack.yaml").read_text())
        stack = {**self.stored, "base": {**self.stored["base"], "section": dict.fromkeys(RIGHTS, True)}}
        (self.run / "final" / "stack.yaml").write_text(yaml.safe_dump(stack))
        (self.run / "final" / "checksums.json").unlink()
        assert self.ran()

    def ran(self) -> bool:
        """Whether code of the folder ran since this was last asked."""
        found = self.mark.exists()
        self.mark.unlink(missing_ok=True)
        return found


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Planted]:
    """The run, with a cache of remote code of its own."""
    root = tmp_path_factory.mktemp("planted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(root / "modules"))
        yield Planted(root)


def adapter(planted: Planted, folder: Path) -> Path:
    """A PEFT folder that names the model, and the right."""
    assert cli(["export", str(planted.run), TRUST, "--to", "peft", "--out", str(folder)]) == 0
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "trust_remote_code": True}))
    planted.ran()
    return folder


def test_what_a_run_leaves_grants_nothing(planted: Planted) -> None:
    assert not set(RIGHTS) & set(planted.stored["base"]["section"])


def verbs(planted: Planted, folder: Path) -> dict[str, tuple[list[str], list[str]]]:
    """Verb -> (its words, the words with which the person allows it)."""
    run, own = str(planted.run), [TRUST]
    short = ["steps=1", f"run.dir={folder}/out", "data.limit=2", "eval.every=null", *QUIET]
    asked = ["prompts=builtin:prompts", "limit=1", "max_new_tokens=1", f"run.dir={folder}/rows", 'cut="keep"', "log.live=off"]
    return {
        "eval": (["eval", run, "eval.batches=1"], own),
        "chat": (["chat", run, "--prompt", "a", "--max-new-tokens", "1"], own),
        "generate": (["generate", f"model={run}", *asked], [f'words=["{TRUST}"]']),
        "export": (["export", run, "--to", "merged", "--out", f"{folder}/merged"], own),
        "train on a run": (["train", "recipe=sft_lora", f"model.path={run}", *short], own),
        "train on a model": (["train", "recipe=sft_lora", f"model.path={planted.model}", *short], own),
        "check": (["check", "recipe=sft_lora", f"model.path={run}", *short], own),
        "train by the recipe of a run": (["train", f"recipe={run}/recipe.yaml", *short], own),
        "train by a run": (["train", f"recipe={run}", *short], own),
    }


FAST = ("eval", "generate", "export", "check")
SLOW = ("chat", "train on a run", "train on a model", "train by the recipe of a run", "train by a run")


@pytest.mark.parametrize("verb", [*FAST, *(pytest.param(verb, marks=pytest.mark.slow) for verb in SLOW)])
def test_a_verb_runs_code_by_the_persons_word_alone(
    planted: Planted, verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, allowed = verbs(planted, tmp_path)[verb]
    assert cli(words) == 2
    said = capsys.readouterr().err
    assert "comes with its own Python code" in said and TRUST in said and not planted.ran()
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    assert cli([*words, *allowed]) == 0, capsys.readouterr().err
    assert planted.ran()


def test_python_opens_by_its_arguments(planted: Planted, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(planted.run, other)
    folder = adapter(planted, tmp_path / "adapter")
    for what in (planted.run, folder, [planted.run, other], [planted.run, folder]):
        with pytest.raises(ModelError, match=r"trust_remote_code=True"):
            load(what)
        assert not planted.ran()
        load(what, trust_remote_code=True)
        assert planted.ran()


@pytest.mark.slow
def test_runs_side_by_side_take_the_word(planted: Planted, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    shutil.copytree(planted.run, other)
    words = ["chat", str(planted.run), str(other), "--prompt", "a", "--max-new-tokens", "1"]
    assert cli(words) == 2 and TRUST in capsys.readouterr().err and not planted.ran()
    assert cli([*words, TRUST]) == 0 and planted.ran()


def test_a_resumed_run_is_told_again_and_is_the_same_recipe(
    planted: Planted, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(planted.run, run)
    shutil.rmtree(run / "final")
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps({**status, "status": "interrupted"}))
    assert compose(run / "recipe.yaml").recipe.model.trust_remote_code is False
    assert yaml.safe_load((run / "recipe.yaml").read_text())["model"]["trust_remote_code"] is True
    assert cli(["train", f"resume={run}"]) == 2
    assert TRUST in capsys.readouterr().err and not planted.ran()
    assert cli(["train", f"resume={run}", TRUST, "eval.load_best=false"]) == 0, capsys.readouterr().err
    assert planted.ran() and (run / "final" / "stack.yaml").is_file()


def test_a_tokenizer_with_code_names_the_key(planted: Planted, tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    mark = tmp_path / "mark"
    (folder / "tokens.py").write_text(f"open({str(mark)!r}, 'w')\n")
    about = {"tokenizer_class": "Tokens", "auto_map": {"AutoTokenizer": ["tokens.Tokens", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    (folder / "config.json").write_text(json.dumps({"model_type": "planted_tokens"}))
    with pytest.raises(ModelError, match=r"tokenizer of .* comes with its own Python code.*model\.trust_remote_code=true"):
        load_tokenizer(ModelSection(), TokenizerSection(path=str(folder)))
    assert not mark.exists()


def test_fresh_weights_of_code_in_the_folder_ask_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A config Transformers knows and a model it does not: with fresh weights, too, nothing asks whether its code may run."""
    monkeypatch.setattr("builtins.input", lambda *words: pytest.fail(f"asked: {words}"))
    mark = tmp_path / "mark"
    (tmp_path / "code.py").write_text(f"open({str(mark)!r}, 'w')\n")
    config = {"model_type": "vit", "hidden_size": 8, "auto_map": {"AutoModelForCausalLM": "code.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    section = ModelSection(path=str(tmp_path), init="random")
    for build in (load_model, skeleton):
        with pytest.raises(ModelError, match=r"its own Python code.*model\.trust_remote_code=true"):
            build(section)
    assert not mark.exists()


def test_pickles_in_the_base_of_a_run_need_the_word(planted: Planted, tmp_path: Path) -> None:
    run, base = tmp_path / "run", tmp_path / "base"
    shutil.copytree(planted.run, run)
    shutil.copytree(TINY, base)
    torch.save(load_file(str(base / "model.safetensors")), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    stack = {**planted.stored, "base": {"path": str(base), "section": {"allow_pickle": True}}}
    (run / "final" / "stack.yaml").write_text(yaml.safe_dump(stack))
    with pytest.raises(ModelError, match=r"pickle weights only.*model\.allow_pickle=true"):
        load(run)
    load(run, allow_pickle=True)


def test_a_stage_that_goes_on_gets_the_rights_of_its_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(f"stages: {{a: {{recipe: sft_lora, with: [{TRUST}]}}, b: {{recipe: sft_lora}}}}\n")
    made = plan(compose("mine.yaml"))
    resumed = [command_of(stage, continued=True) for stage in made.stages]
    assert [TRUST in words for words in resumed] == [True, False]
