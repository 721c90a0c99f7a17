"""A PEFT folder that vLLM serves: checked against the rules of its LoRA support before it is written.

vLLM reads one rank and one alpha for all modules, and refuses what it cannot add to a base at run time. Its rules stand in
`vllm/lora/peft_helper.py` and `vllm/config/lora.py`; each refusal here names the one that is broken.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmrecipe.core.errors import ModelError
from llmrecipe.core.foreign import read_json
from llmrecipe.interop.load_run import open_run
from llmrecipe.interop.merged import Exported, target_folder
from llmrecipe.interop.peft.exporter import branches_of, export_peft
from llmrecipe.interop.peft.layout import CONFIG_FILE, Adapter
from llmrecipe.models.checkpoint_path import TINY, adapter_base
from llmrecipe.models.native.config import NativeConfig
from llmrecipe.runs.open_model import LoadedModel
from llmrecipe.runs.run_names import run_title

NAME = "vllm-lora"
COMMAND = f"export --to {NAME}"
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values of `--max-lora-rank`; an adapter may have any rank up to it."""
DEFAULT_RANK = 16
FACTORS = (".lora_A.weight", ".lora_B.weight")
"""Ends of the names of tensors that it reads."""
TEMPLATE_FILE = "chat_template.jinja"
BASE_FOLDER = "base"
"""Folder of the copied base in an adapter folder."""


def export_vllm_lora(
    run: str | Path,
    out: str | Path | None = None,
    *,
    base: str | None = None,
    bound: float | None = None,
    options: dict[str, dict[str, Any]] | None = None,
    loaded: LoadedModel | None = None,
    rights: Mapping[str, bool] | None = None,
) -> Exported:
    """Write a run's low-rank changes as a LoRA folder for vLLM, and say how it is served; arguments as in `export_peft`.

    Args:
        base: hub id of the base that the command names; default: the base as the run knows it, of which the model inside this
            package is copied.

    Raises:
        ModelError: vLLM has no place for the run, naming the rule (said before anything is written), or the logits moved.
        RunError: the folder exists, or the disk is full.
    """
    target = target_folder(run, out, NAME)
    loaded = loaded or open_run(str(run), options=options, rights=rights)
    if loaded.head != "causal":
        raise _refusal("it serves adapters of models that continue a text")
    if isinstance(loaded.model.config, NativeConfig):
        raise _refusal("it knows no native base model")
    if loaded.mounted:
        try:
            branches_of(loaded.model, loaded.mounted)
        except ModelError as error:
            raise _refusal(f"it adds low-rank changes of weights alone ({str(error).partition(': ')[2]})") from error
    done = export_peft(
        run, target, bound=bound, uniform=True, as_lora=True, loaded=loaded, rights=rights, check=check_rules, command=COMMAND
    )
    notes = list(done.notes)
    if base is None and embedded(done.path):
        base = str(copy_base(done.path))
        notes.append(f"its base is the model inside this package, which was copied to {base}")
    return Exported(
        done.path, done.difference, [*notes, f"vLLM: {serve_command(done.path, run_title(Path(run).resolve()), base)}"]
    )


def embedded(folder: Path) -> bool:
    """Return whether the base that an adapter folder names is the model inside this package."""
    return Path(adapter_base(str(folder))) == TINY


def copy_base(folder: Path) -> Path:
    """Copy the model inside this package into an adapter folder, where a server can be pointed at it."""
    return Path(shutil.copytree(TINY, folder / BASE_FOLDER, ignore=shutil.ignore_patterns("*.md")))


def check_rules(adapter: Adapter, command: str = COMMAND) -> None:
    """Refuse an adapter that vLLM would not load.

    Args:
        command: begins the message.

    Raises:
        ModelError: naming the rule.
    """
    config = adapter.config
    rest = sorted(name for name in adapter.tensors if not name.endswith(FACTORS))
    reason = None
    if config.get("modules_to_save"):
        reason = f"modules_to_save must be empty, and {', '.join(config['modules_to_save'])} was trained whole"
    elif config.get("use_dora"):
        reason = "it has no DoRA (use_dora)"
    elif config.get("bias", "none") != "none" or config.get("lora_bias"):
        reason = "an adapter has no biases (bias, lora_bias)"
    elif config.get("target_parameters"):
        reason = "it reads no adapters of fused expert tensors (target_parameters)"
    elif config["r"] > RANKS[-1]:
        reason = f"the largest rank is {RANKS[-1]}, and this one has {config['r']}"
    elif rest:
        reason = f"it reads lora_A and lora_B of linear layers, and the adapter has {rest[0]}"
    if reason is not None:
        raise _refusal(reason, command)


def _refusal(rule: str, command: str = COMMAND) -> ModelError:
    rest = "; export --to merged serves the run whole" if command == COMMAND else ""
    return ModelError(f"{command}: vLLM loads no such adapter: {rule}{rest}")


def serve_command(folder: Path, name: str, base: str | None) -> str:
    """Return the command that serves an adapter folder.

    Args:
        name: what clients call the model.
        base: hub id of the base; None takes the one the folder names.
    """
    config = read_json(folder / CONFIG_FILE)
    words = ["vllm", "serve", base or str(config["base_model_name_or_path"]), "--enable-lora"]
    if config["r"] > DEFAULT_RANK:
        words += ["--max-lora-rank", str(next(rank for rank in RANKS if rank >= config["r"]))]
    words += ["--lora-modules", f"{name}={folder}"]
    if (folder / TEMPLATE_FILE).is_file():
        # Without it vLLM would prompt by the template of the base.
        words += ["--chat-template", str(folder / TEMPLATE_FILE)]
    return shlex.join(words)
