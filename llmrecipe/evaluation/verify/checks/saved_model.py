"""The model in memory and the one that `final/` gives back."""

from __future__ import annotations

from typing import ClassVar

import torch

from llmrecipe.core.registry import register
from llmrecipe.evaluation.verify.bench import Bench
from llmrecipe.evaluation.verify.verification import Measured, Verification
from llmrecipe.interop import verify_logits
from llmrecipe.interop.load_run import open_run


@register
class SavedModel(Verification):
    """Logits of the trained model in memory = those of the run read from disk."""

    order: ClassVar[int] = 40

    def measure(self, bench: Bench) -> Measured:
        """Compare logits on seeded tokens."""
        run = bench.run
        ids = verify_logits.probe_inputs(run.model, run.tokenizer)
        wanted = verify_logits.logits_of(run.model, ids)
        loaded = open_run(str(bench.directory))
        loaded.model.to(run.roles.device)
        found = verify_logits.compare_logits(wanted, verify_logits.logits_of(loaded.model, ids), torch.float32)
        scale = found.scale or 1.0
        return Measured("logits in memory = logits of final/ read from disk", found.largest / scale, bench.bound)
