"""Scores of whole texts: those of the family's own head, or of a head on states that are pooled as an option says."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from llmrecipe.core.errors import RecipeError
from llmrecipe.core.foreign import read_json
from llmrecipe.core.option_types import Literal
from llmrecipe.core.registry import options
from llmrecipe.data.collate import Batch
from llmrecipe.engine.pooling import Pool
from llmrecipe.engine.role_models import Roles
from llmrecipe.models import task_heads
from llmrecipe.models.checkpoint_path import locate, run_folder
from llmrecipe.models.excluded import without_language_head
from llmrecipe.models.folder_pooling import folder_pooling
from llmrecipe.models.resolve_class import STATES, language_head
from llmrecipe.objectives.finetuning._engines.text_rows import text_batch

if TYPE_CHECKING:
    from llmrecipe.models.pretrained import LanguageModel
    from llmrecipe.recipe.schema import ModelSection

HEAD = "label"
"""Role of the head on pooled states."""
POOLS = {"mean": "avg", "cls": "cls", "last": "last"}
"""Pooling -> its name in the engine."""


@options
class PooledScores:
    """Mixin for an `Objective` that gives a whole text one score for each of its outputs."""

    pooling: Literal["mean", "cls", "last"] | None = None
    """One linear layer reads the mean of the last states of a text, its first or its last one; padding has no share.
    Default: the pooling of a sentence-transformers folder, else the head of the model's family."""

    head: ClassVar[str] = "classification"
    answers_labels: ClassVar[bool] = True

    @cached_property
    def from_folder(self) -> list[str]:
        """Hold the pooling that the model's folder names, once it is known."""
        return []

    @property
    def pooled(self) -> str | None:
        """Return how states are pooled; None where the head of the family does it."""
        return self.pooling or next(iter(self.from_folder), None)

    def model_head(self) -> str:
        """Return the head of the family, or none but the new one where states are pooled here."""
        return self.head if self.pooled is None else STATES

    def read_folder(self, section: ModelSection) -> None:
        """Pool as the model's folder says, where the recipe does not."""
        run = run_folder(section.path)
        if self.pooling is not None or (run is None and section.init == "random"):
            return
        place, local = locate(section.path) if run is None else (run, True)
        found = None if not local else folder_pooling(Path(place)) if run is None else kept_pooling(run)
        if found is not None and found not in POOLS:
            raise RecipeError(
                f"objective.pooling: {section.path} pools by '{found}', and a classifier here by {', '.join(POOLS)}; set "
                "objective.pooling to one of them"
            )
        self.from_folder[:] = [] if found is None else [found]

    def add_label_head(self, model: LanguageModel, outputs: int, seed: int) -> None:
        """Add the layer on pooled states and leave out the head of the language model; nothing where the family has its own.

        Raises:
            RecipeError: the first token of a decoder, which has seen no other.
        """
        if self.pooled is None:
            return
        if self.pooled == "cls" and language_head(model.config) == "causal":
            raise RecipeError("objective.pooling: cls: the first token of a decoder has seen no other; use last or mean")
        task_heads.add_label_head(model, HEAD, outputs, seed)
        without_language_head(model)

    def documents(self, roles: Roles) -> dict[str, dict[str, Any]]:
        """Return how a text becomes a vector when the model is used."""
        if self.pooled is None:
            return {}
        used = {"pool": POOLS[self.pooled], "mlp": False, "normalize": False, "max_length": roles.max_length}
        return {task_heads.POOLING_FILE: {**used, "head": HEAD}}

    def lay_out(self, rows: list[dict[str, Any]], roles: Roles, extra: dict[str, Tensor]) -> Batch:
        """Lay texts out; where a family's own head takes the first token of each row, or texts have two parts, one a row."""
        single = hasattr(roles.model, "score") if self.pooled is None else not (rows and rows[0].get("type_ids"))
        return text_batch(rows, roles, extra, packed=single)

    def scores(self, batch: Batch, roles: Roles) -> Tensor:
        """Return the scores (S, C) of texts."""
        if self.pooled is None:
            return roles.policy(batch, want="scores")["scores"]
        return roles.policy(batch, want="pooled", pool=Pool(POOLS[self.pooled], HEAD))["pooled"]


def kept_pooling(run: Path) -> str | None:
    """Return how a finished run pools for its head; None where the head is that of the family, or none."""
    if not (run / task_heads.POOLING_FILE).is_file():
        return None
    kept = read_json(run / task_heads.POOLING_FILE, "model.path", "copy the run again")
    return next((name for name, kind in POOLS.items() if kept.get("pool") == kind and kept.get("head") == HEAD), None)
