"""The `data` section: where rows come from and how they become tokens."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator

from llmrecipe.core.option_types import registered
from llmrecipe.recipe.section import Place, Section, Share


class DataSection(Section):
    """Where rows come from and how they become tokens."""

    path: Place | list[Place] | dict[Place, float] | None = Field(
        None,
        description="File, folder with train/valid/test files, hub name, `builtin:NAME`, list, or {path: weight}.",
    )
    shares: Literal["rows", "tokens"] = Field(
        "rows",
        description="What the weights of several sources are shares of: rows, or their targets, so that a source of long rows "
        "gets no larger part of the loss than its weight says.",
    )
    format: str = Field(
        "auto", description="Row format; `auto` detects and prints it.", json_schema_extra=registered("format", "auto")
    )
    columns: dict[str, str] = Field(default_factory=dict, description="Mapping wanted column -> column in the file.")
    label_words: dict[int | str, str] = Field(
        default_factory=dict,
        description="Label -> the word that says it, such as {0: bad, 1: good}: rows of a text and a label become questions "
        "with these words to choose from, for objective=choices.",
    )
    label_prompt: str = Field(
        "{text}",
        description="What `label_words` continue: text with columns of the row in braces, such as '{text} All in all, it was'.",
    )
    control: dict[str, Literal["rows", "words"]] = Field(
        default_factory=dict,
        description="For a control run, in which training rows teach nothing: column of the file -> `rows` (each row has the "
        "value of another row) or `words` (each word of a text comes from another row). Validation and test stay as they are.",
    )
    validation: str | Share | None = Field(None, description="File or share of the training rows; default: the folder's own.")
    test: str | Share | None = Field(None, description="Like validation; read once, after training.")
    train_on: Literal["train", "train+validation"] = Field(
        "train",
        description="Rows that train. `train+validation` joins both splits, which leaves none to validate on: for the last "
        "run, once its settings are chosen.",
    )
    max_length: PositiveInt = Field(1024, description="Longest row in tokens.")
    truncation: str = Field(
        "auto",
        description="What happens to longer rows; `auto` splits plain text into consecutive rows and leaves out others.",
        json_schema_extra=registered("truncation"),
    )
    blocks: bool = Field(
        False,
        description="Training rows of plain text have max_length tokens each, cut from all documents laid end to end; weights "
        "of sources then count tokens. With packing=off tokens also see what is before their document.",
    )
    stride: PositiveInt | None = Field(
        None,
        description="Validation and test read a long text in windows of max_length that move on by this many tokens and "
        "predict each token once; smaller gives more context. Default: windows share one token. Passages of questions are read "
        "so in every split; default: windows move on by half of what they hold.",
    )
    packing: Literal["auto", "on", "off"] = Field("auto", description="Lay rows end to end without padding, isolated.")
    limit: PositiveInt | None = Field(None, description="Use this many training rows, drawn with the seed.")
    streaming: bool = Field(False, description="Read rows as they come; no shuffle beyond a buffer, no token cache.")
    workers: NonNegativeInt = Field(0, description="Processes that tokenize; 0 picks one per core for large data.")
    cache: bool = Field(True, description="Keep token ids on disk, keyed by content.")
    system: str | None = Field(None, description="System message put before conversations that have none.")
    drop_fields: list[str] = Field(
        default_factory=list,
        description="Fields of messages, and columns, to leave out where the chat template does not render them (name, tools).",
    )
    max_dropped: Share = Field(0.05, description="Largest share of rows that may be dropped before the run stops.")
    max_line: PositiveInt = Field(1 << 26, description="Longest line of a file, in bytes.")
    max_unpacked: PositiveInt = Field(1 << 30, description="Largest compressed file once unpacked, in bytes.")
    max_pixels: PositiveInt = Field(1 << 26, description="Largest picture, in pixels.")
    max_moved: float = Field(
        0.5, ge=0.0, le=1.0, description="Largest share of rows whose prompt may lose its end to the answer's first token."
    )

    @field_validator("label_words")
    @classmethod
    def _one_kind(cls, given: dict[int | str, str]) -> dict[int | str, str]:
        """Refuse labels of which some are numbers and some are text: they have no order, by which results are named."""
        if len({type(label) for label in given}) > 1:
            raise ValueError("labels that are all numbers, or all text")
        return given
