"""The validated recipe: every top-level key, its type, its default and its meaning.

`Recipe` is what the rest of the package receives. Components (`objective`, each entry of `stack`, `optim`, `schedule`)
stay mappings here; `recipe.validate` turns them into their registered classes.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    PrivateAttr,
    field_validator,
    model_validator,
)

from llmrecipe.core.errors import RecipeError
from llmrecipe.core.option_types import StopText, registered
from llmrecipe.core.time_limit import compiled

Share = Annotated[float, Field(ge=0.0, lt=1.0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


def one_folder(name: str) -> str:
    """Return a name that can be that of one folder, and of no folder above.

    Raises:
        ValueError: it cannot.
    """
    if not name.strip() or name in (".", "..") or len(name) > 200 or any(c in "/\\" or ord(c) < 32 for c in name):
        raise ValueError("a name of one folder, without / and \\ (run.root says where it is)")
    return name


FolderName = Annotated[str, AfterValidator(one_folder)]
Place = Annotated[str, Field(min_length=1)]
"""A file, a folder or a name; empty text, as of a shell variable that is not set, would be the working folder."""


class Section(BaseModel):
    """A section of a recipe: strict types, finite numbers, unknown keys forbidden."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, populate_by_name=True, allow_inf_nan=False)


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
    compile: bool = Field(False, description="torch.compile the forward pass; pays off after thousands of steps.")
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


class RangeSection(Section):
    """Numbers between two ends, both allowed; whole numbers where both ends are."""

    low: int | float
    high: int | float
    log: bool = Field(False, description="Draw evenly in the logarithm.")
    step: PositiveInt | PositiveFloat | None = Field(None, description="Only low + k * step.")

    @model_validator(mode="after")
    def _ends(self) -> RangeSection:
        if not self.low < self.high:
            raise ValueError(f"a range whose low ({self.low}) is below its high ({self.high})")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("a range above 0 and without step where log is true")
        return self


class SearchSection(Section):
    """What `llmrecipe search` tries."""

    space: dict[str, list[Any] | RangeSection] = Field(
        default_factory=dict, description="Key of the recipe -> values to choose from, or {low, high, log, step}."
    )
    sampler: Literal["tpe", "gp", "saas_map", "auto", "nsga2", "random", "grid", "stepwise"] = Field(
        "tpe",
        description="How the next trial is chosen: densities, a Gaussian process, one with a sparsity prior by BoTorch "
        "(saas_map; auto takes it where it is installed, else gp), evolution, by chance; grid tries everything; stepwise fixes "
        "one key after the other, each at the value that is best on average.",
    )
    against: list[Literal["parameters", "memory", "seconds"]] = Field(
        default_factory=list,
        description="Costs to make small while eval.monitor gets better: numbers a run leaves, peak MB, seconds of its steps.",
    )
    pick: Literal["best", "knee"] = Field(
        "best", description="Trial of the front that becomes searched.yaml: the best score, or the bend of score over cost."
    )
    limits: dict[Literal["parameters", "memory", "seconds"], PositiveInt | PositiveFloat] = Field(
        default_factory=dict, description="Largest cost of the trial that is picked."
    )
    start: list[dict[str, Any]] = Field(
        default_factory=list, description="Points that are tried first, such as designs made by hand."
    )
    samples: PositiveInt = Field(
        4, description="Trials stepwise makes for each value of a key, with the keys after it drawn by chance."
    )
    trials: PositiveInt = Field(20, description="Trials; grid and stepwise have as many as they need.")
    parallel: PositiveInt = Field(
        1,
        description="Trials that run at once; a trial is chosen by what the rounds of that many before its own have shown.",
    )
    seeds: list[NonNegativeInt] = Field(
        default_factory=list, description="Seeds each trial is run with; its value is their mean. Default: the recipe's seed."
    )
    seed: NonNegativeInt = Field(0, description="Seed of the sampler.")
    lr_scaling: Literal["off", "sqrt", "linear"] = Field(
        "off",
        description="Multiply the learning rate of a trial by (b / b0)^(1/2) (sqrt: Adam) or b / b0 (linear: SGD), b its "
        "batch.size and b0 the recipe's, so that optim.lr of the space is that of b0.",
    )
    final: bool = Field(
        False,
        description="Train the best point once more on training and validation rows together, for as long as its trial took to "
        "its best evaluation, and score the test split once.",
    )
    prune: Literal["off", "halving", "median"] = Field(
        "off", description="Stop trials early that are behind at an evaluation (needs eval.every)."
    )

    @model_validator(mode="before")
    @classmethod
    def _flat(cls, given: object) -> object:
        """Flatten `optim: {lr: ...}` in the space to `optim.lr: ...`."""
        if not isinstance(given, dict) or not isinstance(given.get("space"), dict):
            return given
        return {**given, "space": _flat_space(given["space"])}


def _flat_space(space: dict[str, Any], at: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in space.items():
        key = f"{at}.{name}" if at else str(name)
        if isinstance(value, dict) and not set(value) & set(RangeSection.model_fields):
            inner = _flat_space(value, key)
        else:
            inner = {key: value}
        for path, choice in inner.items():
            both = isinstance(found.get(path), dict) and isinstance(choice, dict)
            found[path] = {**found[path], **choice} if both else choice
    return found


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
