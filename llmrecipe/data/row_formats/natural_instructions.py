"""Data format: a task of Super-NaturalInstructions."""

from __future__ import annotations

from typing import ClassVar

from llmrecipe.core.registry import register
from llmrecipe.data.formats.bad_row import BadRow
from llmrecipe.data.formats.cells import filled_text
from llmrecipe.data.formats.conversations import right_answers, with_choices
from llmrecipe.data.formats.data_format import Conversion, DataFormat, Row
from llmrecipe.data.formats.messages import is_texts

PROMPT = "Definition: {definition}\n\nNow complete the following example -\nInput: {given}\nOutput:"


@register
class NaturalInstructions(DataFormat):
    """A task with its definition and instances (Super-NaturalInstructions), or one instance with the definition.

    A file is a task: one row gives a prompt for each instance, its definition and its input. Of several right outputs the first
    is trained, and a generated answer is scored against all of them. The examples that the file shows are not read.
    Source: Super-NaturalInstructions: Generalization via Declarative Instructions on 1600+ NLP Tasks (arXiv 2204.07705).
    """

    columns: ClassVar[tuple[tuple[str, ...], ...]] = (("Definition", "Instances"), ("definition", "inputs", "targets"))
    becomes: ClassVar[dict[str, int]] = {"choices": 14, "dialogue": 27}
    file_is_task: ClassVar[bool] = True
    example: ClassVar[str] = (
        '{"Definition": ["Name the opposite of a word."], "Instances": [{"id": "1", "input": "hot", "output": ["cold"]}]}'
    )

    def convert(self, row: Row, conversion: Conversion) -> list[Row]:
        """Return a prompt with its answer for each instance."""
        if "Instances" not in row:
            definition, pairs = filled_text(row, "definition"), [(row["inputs"], row["targets"])]
        else:
            lines = row["Definition"]
            definition = " ".join(lines) if isinstance(lines, list) else filled_text(row, "Definition")
            pairs = [(one["input"], one["output"]) for one in row["Instances"]]
        if not pairs:
            raise BadRow("the task has no instances")
        return [_instance(definition, given, output, conversion) for given, output in pairs]


def _instance(definition: str, given: object, output: object, conversion: Conversion) -> Row:
    """Return the prompt of an instance with its outputs."""
    right = [output] if isinstance(output, str) else output
    if not isinstance(given, str) or not is_texts(right):
        raise BadRow("an instance has no input or no output", f"{given!r:.40} and {output!r:.40}")
    prompt = PROMPT.format(definition=definition.strip(), given=given.strip())
    outputs = [f" {text.strip()}" for text in right]
    if conversion.rows == "choices":
        return with_choices({"prompt": prompt, "completion": outputs[0]}, conversion)
    return right_answers({"prompt": prompt}, outputs, conversion)
