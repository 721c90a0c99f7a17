"""No export leaves a part of a hybrid out: what another format cannot hold is refused by the name of the part."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmrecipe.core import registry
from llmrecipe.core.errors import UserError
from llmrecipe.interop.merged import export_merged
from llmrecipe.interop.peft.exporter import export_adapter_hub, export_peft
from tests.contract import OPTIONS
from tests.interop.saved_runs import base_folder, saved_run

HYBRIDS = [name for name in registry.names("stack") if registry.spec("stack", name).family == "hybrid"]


@pytest.mark.parametrize("kind", HYBRIDS)
def test_a_part_that_another_format_cannot_hold_is_named(kind: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    wrapper = registry.load_class("stack", kind)(name=kind, **OPTIONS.get(kind, {}))
    saved_run(run, base_folder(tmp_path), wrapper)
    for export in (export_peft, export_merged, export_adapter_hub):
        if kind == "llm_adapters" and export is export_adapter_hub:
            continue  # its series adapter is one that adapter-hub has
        with pytest.raises(UserError, match=rf"\b{kind}"):
            export(run)
    assert {path.name for path in run.iterdir()}.isdisjoint({"peft", "merged", "adapter_hub"})
