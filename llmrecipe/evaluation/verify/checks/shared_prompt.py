"""A prompt that several answers share."""

from __future__ import annotations

from typing import ClassVar

import torch

from llmrecipe.core.registry import register
from llmrecipe.evaluation.verify.bench import Bench, largest
from llmrecipe.evaluation.verify.documents import documents_of
from llmrecipe.evaluation.verify.verification import Measured, NotApplicable, Verification


@register
class SharedPrompt(Verification):
    """Log-probabilities of answers that share a prompt = those of every answer behind a prompt of its own."""

    order: ClassVar[int] = 20

    def measure(self, bench: Bench) -> Measured:
        """Compare each answer's tokens with those of the answer alone."""
        with bench.probing() as run, torch.no_grad():
            packed = [m for m in bench.micros(run) if m.layout is not None]
            shared = [m for m in packed if m.layout is not None and any(s.parent is not None for s in m.layout.segments)]
            if not shared:
                raise NotApplicable("no answers share a prompt in a packed row")
            worst, where = 0.0, ""
            for micro in shared:
                together = run.roles.engine(micro)["logprobs"]
                for document in documents_of(micro):
                    alone = document.batch(run.roles.pad_id).to(run.roles.device)
                    places = [index for index, _ in document.places]
                    apart, _ = largest({"t": run.roles.engine(alone)["logprobs"]}, {"t": together[places]})
                    if not apart <= worst:
                        worst, where = (
                            apart,
                            f"an answer of {len(places)} tokens in a text of {len(document.ids)}",
                        )
        return Measured("log-probabilities behind a shared prompt = behind a prompt of one's own", worst, bench.bound, where)
