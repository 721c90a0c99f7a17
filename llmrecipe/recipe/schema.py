"""The validated recipe: every top-level key, its type, its default and its meaning.

`Recipe` is what the rest of the package receives. Components (`objective`, each entry of `stack`, `optim`, `schedule`)
stay mappings here; `recipe.validate` turns them into their registered classes. The sections `data` and `search` have files of
their own.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, PrivateAttr, field_validator, model_validator

from llmrecipe.core.errors import RecipeError
from llmrecipe.core.option_types import StopText, registered
from llmrecipe.core.time_limit import compiled
from llmrecipe.recipe.data_section import DataSection
from llmrecipe.recipe.search_section import SearchSection
from llmrecipe.recipe.section import FolderName, Fraction, Place, Section


class ModelSection(Section):
    """Which model is trained, and how it is loaded."""

    path: Place = Field("tiny", description="Folder, hub name, run directory, or `tiny` (the model inside the package).")
    init: Literal["pretrained", "random"] = Field("pretrained", description="Trained weights, or fresh ones from the config.")
    config: dict[str, Any] = Field(
        default_factory=dict, description="Config values to set (with init=random: `model_type` and sizes, no path needed)."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Dtype of frozen weights and of the computation; trained tensors stay float32. `auto`: float32 on a CPU, "
        "else the checkpoint's own.",
    )
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = Field("auto", description="Attention backend.")
    packed_attention: Literal["auto", "loop", "varlen", "flash", "flex"] = Field(
        "auto",
        description="How packed rows are attended: one call per document (loop), or all of them in one, by torch (varlen), the "
        "flash-attn package or FlexAttention (flex). `auto`: loop on a CPU, on a GPU the first that can compute the call.",
    )
    gradient_checkpointing: bool | Literal["selective", "offload"] = Field(
        False,
        description="What of a block waits for the backward pass, instead of everything: its inputs (true), its inputs and the "
        "results of linear layers and fused attention, which leaves little to compute again (selective), its inputs, in the "
        "memory of the machine (offload).",
    )
    compile: Literal["auto", "off", "blocks"] = Field(
        "auto",
        description="torch.compile each transformer block (blocks), for rows of any length; it pays off after thousands of "
        "steps. `auto`: off.",
    )
    kernels: Literal["auto", "off", "liger"] = Field(
        "auto",
        description="Fused kernels of the liger-kernel package for rotary embeddings and gated activations, where blocks are "
        "not compiled (liger; `pip install 'llmrecipe[kernels]'`). `auto`: off.",
    )
    revision: str | None = Field(None, description="Hub revision.")
    trust_remote_code: bool = Field(
        False, description="Run Python code that comes with the checkpoint. Off unless you opt in; never read from a run."
    )
    allow_pickle: bool = Field(False, description="Read pickle weights (.bin). Off unless you opt in; never read from a run.")
    allow_mismatch: list[str] = Field(
        default_factory=list, description="Name patterns of weights that may be missing, extra or newly initialised."
    )
    anatomy: dict[str, str] | None = Field(None, description="Site names by hand, when inference cannot find them.")
    adapters: dict[str, float] = Field(
        default_factory=dict, description="PEFT adapter folders to mount on the model, each with its weight: {FOLDER: 1.0}."
    )
    continue_: bool = Field(False, alias="continue", description="With a run directory: train its own adapters further.")


class SpecialTokensSection(Section):
    """The special tokens of a trained tokenizer by role, numbered in this order; null leaves a role out."""

    pad: str | None = Field("<pad>", description="Padding.")
    bos: str | None = Field("<bos>", description="Start of a document.")
    eos: str | None = Field("<eos>", description="End of a document.")
    unk: str | None = Field(None, description="Characters outside the vocabulary; wordpiece has <unk> where this is null.")
    mask: str | None = Field("<mask>", description="Stands for a hidden token.")
    sep: str | None = Field("<sep>", description="Between two texts; with `cls` also after the last one.")
    cls: str | None = Field(None, description="Start of a text whose first state is read (BERT), in the place of `bos`.")
    extra: list[str] = Field(default_factory=list, description="Further ones: marks of a chat template, of removed spans.")


class TokenizerTrainingSection(Section):
    """A tokenizer made from the training rows before anything else; the vocabulary of a model from nothing follows."""

    algorithm: Literal["bpe", "unigram", "wordpiece"] = Field(
        "bpe",
        description="bpe and unigram work on bytes, so no text is unknown and none is changed; wordpiece on words, as BERT.",
    )
    vocab_size: PositiveInt = Field(description="Tokens in the vocabulary, special ones included.")
    special: SpecialTokensSection = Field(default_factory=SpecialTokensSection)
    rows: PositiveInt | None = Field(None, description="Read this many rows of each source, evenly spaced; default: all.")
    replace: bool = Field(
        False, description="Also with trained weights, whose embedding rows then stand for other tokens than they learned."
    )
    _data: DataSection | None = PrivateAttr(None)
    _kind: str = PrivateAttr("text")

    def bound(self, data: DataSection, kind: str) -> TokenizerTrainingSection:
        """Return the section with the rows it is to read and the row type that the objective makes of them."""
        bound = self.model_copy()
        bound._data, bound._kind = data, kind
        return bound

    def source(self) -> tuple[DataSection, str]:
        """Return the data section of the recipe and the row type; a validated recipe has bound them."""
        assert self._data is not None, "recipe.validate binds the data"
        return self._data, self._kind


class TokenizerSection(Section):
    """The tokenizer, by default the model's own."""

    path: Place | None = Field(None, description="Folder or hub name; default: the model's.")
    chat_template: str | None = Field(
        None,
        description="Name of a built-in template (`llmrecipe list chat_template`), a file, or the Jinja text itself.",
        json_schema_extra=registered("chat_template", "own", open=True),
    )
    add_tokens: list[str] = Field(default_factory=list, description="Tokens to add; their embedding rows are trained.")
    pad_token: str | None = Field(None, description="Token used as padding where the tokenizer has none.")
    mask_token: str | None = Field(None, description="Token that stands for a hidden one; added where it does not exist.")
    train: TokenizerTrainingSection | None = Field(
        None, description="Train one on the training rows: {vocab_size: 8192, algorithm: bpe, special: {...}}."
    )


class ProcessorSection(Section):
    """The image processor of objectives that read pictures, by default the model's own."""

    path: Place | None = Field(None, description="Folder or hub name with a preprocessor_config.json; default: the model's.")
    config: dict[str, Any] = Field(
        default_factory=dict,
        description="Values to set, such as size or image_mean; with `image_processor_type` (ViTImageProcessor) a new one.",
    )


class BatchWarmupSection(Section):
    """Smaller batches at the start of a run, growing to `batch.size`."""

    start: PositiveInt = Field(description="Rows of the first batch.")
    batches: PositiveInt = Field(description="Batches until `size` is reached; the size grows evenly over them.")
    increment: PositiveInt = Field(1, description="Rows by which a batch grows at a time; it divides size - start.")


class BatchSection(Section):
    """How much one optimizer step sees."""

    size: PositiveInt = Field(8, description="Rows (or pairs) in one optimizer step, over all processes.")
    warmup: BatchWarmupSection | None = Field(
        None,
        description="Begin with smaller batches, {start: 8, batches: 1000, increment: 8}: early gradients agree, so few rows "
        "are enough. The learning rate follows its own schedule.",
    )
    micro: PositiveInt | None = Field(None, description="Rows put through the model at once; default: as many as fit `size`.")
    tokens: PositiveInt | None = Field(
        None, description="Cut micro-batches so that none has more tokens than this; default: by the device and its memory."
    )

    @model_validator(mode="after")
    def _growth(self) -> BatchSection:
        warm = self.warmup
        if warm is not None and warm.start >= self.size:
            raise ValueError(f"a warmup.start ({warm.start}) below size ({self.size})")
        if warm is not None and (self.size - warm.start) % warm.increment:
            raise ValueError(f"a warmup.increment ({warm.increment}) that divides size - start ({self.size - warm.start})")
        return self

    def smallest(self) -> tuple[str, int]:
        """Return the rows of the smallest batch, where the data fill it, and the key that says so."""
        return ("batch.size", self.size) if self.warmup is None else ("batch.warmup.start", self.warmup.start)


class RuntimeSection(Section):
    """Where it runs."""

    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="Device.")
    threads: PositiveInt | None = Field(None, description="CPU threads; default: torch's own choice.")
    deterministic: bool = Field(False, description="Only deterministic kernels (GPU); the CPU always is.")
    logit_rows: PositiveInt | None = Field(
        None,
        description="Positions whose logits are formed at once; default: by the cache of a CPU, by the free memory of a GPU.",
    )
    ffn_rows: PositiveInt | None = Field(
        None,
        description="Positions that a feed-forward layer computes at once, and again in the backward pass; default: all, once.",
    )
    optimizer_kernel: Literal["auto", "fused", "foreach", "single"] = Field(
        "auto",
        description="How torch's adamw, sgd, rmsprop and muon make a step: in one kernel (fused), in one for each operation on "
        "all tensors (foreach), or tensor by tensor (single). `auto`: fused where the device and the optimizer have it.",
    )
    decoding: Literal["auto", "continuous", "static", "graphs"] = Field(
        "auto",
        description="How answers are sampled: in a batch whose rows leave and join (continuous), in tensors of fixed shape "
        "(static), or in these with each step replayed as one CUDA graph (graphs). `auto`: continuous.",
    )
    processes: PositiveInt = Field(1, description="Processes this run expects; `launch --nproc N` sets it.")
    shard: Literal["none", "zero1", "zero2", "zero3"] = Field(
        "none",
        description="What the processes divide among themselves instead of each keeping it: the optimizer's state (zero1), "
        "gradients too (zero2), parameters too (zero3).",
    )
    backend: Literal["torch", "deepspeed"] = Field("torch", description="Library that divides it.")
    state_dict: Literal["full", "sharded"] = Field(
        "full",
        description="How a checkpoint holds what zero2 and zero3 divide of what was learned and of the optimizer's state: "
        "gathered by the main process, or each process's part in a file of its own, on one file system. Any number of "
        "processes reads both; the finished model is whole.",
    )
    offload: Literal["none", "cpu"] = Field(
        "none",
        description="Where the parts of zero2 and zero3 rest: on the device, or in the memory of the machine (parameters, "
        "gradients and the optimizer's state, which steps there).",
    )
    dp_replicate: PositiveInt = Field(
        1, description="Groups of processes that each hold everything once (hybrid sharding with zero2 and zero3)."
    )
    dp_shard: PositiveInt | None = Field(
        None, description="Processes of a group, which divide what `shard` names; default: all that are left."
    )
    tp: PositiveInt = Field(1, description="Processes that share each matrix product (tensor parallel).")
    cp: PositiveInt = Field(1, description="Processes that share each row of tokens (context parallel).")


class EvalSection(Section):
    """Validation, early stopping, best checkpoint and test."""

    every: PositiveInt | None = Field(None, description="Steps between evaluations; default: at the start and the end.")
    at_start: bool = Field(True, description="Evaluate before the first step.")
    batches: PositiveInt | None = Field(None, description="Most batches per evaluation, over all processes together.")
    monitor: str = Field("eval/loss", description="Metric that decides which checkpoint is best.")
    mode: Literal["min", "max"] | None = Field(
        None, description="Whether a small or a large value is better; default: as the metric declares."
    )
    patience: PositiveInt | None = Field(None, description="Stop after this many evaluations without improvement.")
    warmup: NonNegativeInt = Field(0, description="Evaluations at the beginning that patience does not count.")
    min_delta: float = Field(0.0, ge=0.0, description="Smallest change that counts as improvement.")
    load_best: bool = Field(True, description="End with the best checkpoint's weights rather than the last.")
    test: bool = Field(True, description="Score the test split once at the end, if there is one.")
    metrics: list[str] = Field(
        default_factory=list,
        description="Further metrics by name, such as exact_match or rouge_l.",
        json_schema_extra=registered("metric"),
    )
    bootstrap: NonNegativeInt = Field(
        1000,
        description="How often the rows of the test split, of `llmrecipe eval`, and of a search's best trial are drawn again "
        "for the 95 % interval of each score; rows are then read one at a time. 0: no intervals.",
    )
    forgetting: dict[FolderName, str] = Field(
        default_factory=dict,
        description="Held-out general sets, {name: file, folder or `builtin:NAME`}: their loss a token under the model the run "
        "starts from and under the one it ends with; forget/NAME is how much it rose.",
    )
    forgetting_curve: bool = Field(
        False, description="Also score the sets of `eval.forgetting` at every evaluation (eval.every)."
    )
    forgetting_limit: PositiveFloat | None = Field(
        None,
        description="Stop once forget/mean, in nats a token, is above this at an evaluation; the sets are then scored at each.",
    )
    samples: NonNegativeInt = Field(0, description="Generate this many answers at each evaluation.")
    max_new_tokens: PositiveInt = Field(64, description="Length limit of generated answers.")
    stop: list[StopText] = Field(default_factory=list, description="Texts before which a generated answer ends.")
    extract: str | None = Field(
        None,
        description="Regular expression of what eval.metrics compare: of a generated answer and of a reference the last match, "
        "or its group, such as '\\b([A-E])\\b' for the letter of a choice. An answer without one counts as empty.",
    )

    @field_validator("extract")
    @classmethod
    def _pattern(cls, given: str | None) -> str | None:
        """Refuse what is no regular expression, or has several groups."""
        if given is not None:
            try:
                groups = compiled(given, "eval.extract").groups
            except RecipeError as error:
                raise ValueError(f"a regular expression ({str(error).partition('expression: ')[2]})") from error
            if groups > 1:
                raise ValueError(f"a regular expression of one group at most (of {groups}, the others as (?:...))")
        return given


class SaveSection(Section):
    """Checkpoints."""

    every: PositiveInt | None = Field(
        None, description="Steps between checkpoints; default: every five minutes, and on a signal."
    )
    keep: PositiveInt = Field(2, description="Newest checkpoints kept (in addition to the best one).")
    end: bool = Field(True, description="Keep a checkpoint of the last step, from which `resume=RUN steps=MORE` continues.")


class LogSection(Section):
    """What is shown and where it goes."""

    every: PositiveInt = Field(1, description="Steps between step events.")
    live: Literal["auto", "on", "off"] = Field("auto", description="Live display when a person watches, plain lines otherwise.")
    show: list[str] = Field(
        default_factory=list,
        description="Metrics to show besides the objective's few; [all] shows each that the run keeps in events.jsonl.",
    )
    mfu: Literal["auto", "measure", "off"] = Field(
        "auto",
        description="Model FLOPs utilisation in step events: where the peak of the device is known, elsewhere too against a "
        "matrix product timed before the first step (`measure`), or not at all.",
    )
    trackers: list[str] = Field(
        default_factory=list,
        description="Trackers to mirror events to (`llmrecipe list tracker`; each an optional extra).",
        json_schema_extra=registered("tracker"),
    )


class RunSection(Section):
    """Where the run directory is."""

    dir: Place | None = Field(None, description="Run directory; default: runs/<recipe>/<time>-<key>.")
    root: Place = Field("runs", description="Folder that contains run directories.")
    name: FolderName | None = Field(None, description="Name used in the path; default: the recipe's.")
    parallel: PositiveInt = Field(1, description="Stages of a pipeline that may run at once, GPUs and cores divided.")
    keep_going: bool = Field(False, description="A stage that fails does not end the stages that can run without it.")
    on_nan: Literal["stop", "skip"] = Field("stop", description="What a NaN or infinite loss does; the batch is saved.")
    max_skipped: Fraction = Field(
        0.1,
        description="Largest share of the last 100 steps (of all in a shorter run) that `on_nan: skip` leaves out.",
    )


class Recipe(Section):
    """A whole recipe, validated except for its components, which are still mappings with a `kind`."""

    model: ModelSection = Field(default_factory=ModelSection)
    tokenizer: TokenizerSection = Field(default_factory=TokenizerSection)
    processor: ProcessorSection = Field(default_factory=ProcessorSection)
    data: DataSection = Field(default_factory=DataSection)
    objective: dict[str, Any] = Field(default_factory=dict)
    roles: dict[str, Any] = Field(default_factory=dict)
    stack: dict[str, dict[str, Any]] = Field(default_factory=dict)
    optim: dict[str, Any] = Field(default_factory=dict)
    schedule: dict[str, Any] = Field(default_factory=dict)
    runtime: RuntimeSection = Field(default_factory=RuntimeSection)
    eval: EvalSection = Field(default_factory=EvalSection)
    save: SaveSection = Field(default_factory=SaveSection)
    log: LogSection = Field(default_factory=LogSection)
    run: RunSection = Field(default_factory=RunSection)
    seed: NonNegativeInt = 0
    steps: Annotated[PositiveInt, Field(le=10**9)] | None = Field(
        None, description="Optimizer steps; takes precedence over epochs."
    )
    epochs: PositiveFloat | None = Field(None, description="Passes over the training rows.")
    batch: BatchSection = Field(default_factory=BatchSection)
    search: SearchSection | None = None
    stages: dict[str, Any] | None = None
    plugins: list[str] = Field(default_factory=list)
