"""Row type: pictures with labels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import ClassVar

from llmrecipe.core.registry import register
from llmrecipe.data.token_report import Report
from llmrecipe.data.tokenize.encoder import Encoder, Item
from llmrecipe.data.tokenize.row_type import RowType


@register
class LabelledImages(RowType):
    """A picture with a label; no tokens.

    Canonical row: features (a path), label. Token row: features, label (JSON text).
    """

    lists: ClassVar[tuple[str, ...]] = ()
    scalars: ClassVar[tuple[tuple[str, str], ...]] = (("features", "string"), ("label", "string"))
    numbered: ClassVar[bool] = True
    reads_files: ClassVar[bool] = True

    def encode(self, encoder: Encoder, items: Sequence[Item], report: Report) -> None:
        """Keep path and label of each row."""
        for item in items:
            label = item.row["label"]
            for one in label if isinstance(label, list) else [label]:
                report.labels[str(one)] += 1
            item.done.append({"features": item.row["features"], "label": json.dumps(label, ensure_ascii=False)})
