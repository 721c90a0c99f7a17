"""Labels said in words: a text and its label as a question that the head of a language model answers."""

from __future__ import annotations

import re

from llmrecipe.core.errors import DataError
from llmrecipe.data.formats.bad_row import BadRow
from llmrecipe.data.formats.cells import filled_text, label_of
from llmrecipe.data.formats.conversations import with_choices
from llmrecipe.data.formats.data_format import Conversion, Row

COLUMN = re.compile(r"\{(\w+)\}")
"""A column in `data.label_prompt`."""


def label_question(row: Row, conversion: Conversion) -> Row:
    """Return the prompt of a labelled row with the words of all labels to choose from, one blank before each.

    The words are the verbalizer of Exploiting Cloze Questions for Few Shot Text Classification (arXiv 2001.07676), in the place
    where a decoder goes on. Their order is that of `data.label_words`, in every row.

    Raises:
        DataError: there are no words, two labels share one, or the prompt names a column that rows do not have.
        BadRow: the label has no word, or a column is empty.
    """
    words = {str(label): word.strip() for label, word in conversion.label_words.items()}
    if not words:
        raise DataError(
            "data.label_words: rows of a text and a label are questions once each label has a word; set "
            "data.label_words={0: bad, 1: good}, or take objective=classification"
        )
    if len({*words.values()}) < len(words) or not all(words.values()):
        raise DataError(f"data.label_words: each label needs a word of its own; got {dict(conversion.label_words)}")
    wanted = COLUMN.findall(conversion.label_prompt)
    if missing := [name for name in wanted if name not in row]:
        raise DataError(
            f"data.label_prompt: rows have no column '{missing[0]}' (they have {', '.join(row)}); write the texts of a row in "
            "braces, such as '{text} It was'"
        )
    label = str(label_of(row))
    if label not in words:
        raise BadRow("'label' has no word in data.label_words", f"{label:.80}")
    prompt = COLUMN.sub(lambda found: filled_text(row, found[1]).strip(), conversion.label_prompt).rstrip()
    options = [f" {word}" for word in words.values()]
    return with_choices({"prompt": prompt, "completion": f" {words[label]}", "options": options}, conversion)
