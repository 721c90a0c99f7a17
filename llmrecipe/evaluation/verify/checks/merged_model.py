"""The run with its methods folded into the weights."""

from __future__ import annotations

from typing import ClassVar

from llmrecipe.core.errors import ModelError
from llmrecipe.core.registry import register
from llmrecipe.evaluation.verify.bench import Bench
from llmrecipe.evaluation.verify.verification import Measured, NotApplicable, Verification
from llmrecipe.interop.load_run import open_run
from llmrecipe.interop.merged import export_merged, reason

ANY = 1e9
"""A bound that lets the export write whatever it has, so that the difference can be measured."""


@register
class MergedModel(Verification):
    """Logits with the hooks = logits of the folder that `export --to merged` writes, loaded by Transformers alone."""

    order: ClassVar[int] = 41

    def measure(self, bench: Bench) -> Measured:
        """Export the short training and compare logits on seeded tokens."""
        assert bench.run is not None, "the short training comes first"
        loaded = open_run(str(bench.directory))
        for wrapper in loaded.mounted:
            if not wrapper.merges() and wrapper.as_tokens(loaded.model) is None:
                raise NotApplicable(f"{wrapper.name.split('_', 1)[1]} cannot be folded: {reason(wrapper)}")
        try:
            done = export_merged(bench.directory, bench.folder / "merged", bound=ANY, dtype="float32", loaded=loaded)
        except ModelError as error:
            raise NotApplicable(str(error)) from error
        found = done.difference
        return Measured("logits with hooks = merged, read from disk", found.largest / (found.scale or 1.0), bench.bound)
