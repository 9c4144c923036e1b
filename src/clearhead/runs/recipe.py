"""The recipe of a comparison: every key, its default and what it means; and the single job that it resolves to.

Reading from TOML, overrides and writing are in `recipe_io`. Everything here is pure: no file, no model, no torch.
"""

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1, le=10**6)]
Tokens = Annotated[int, Field(ge=1, le=10**15)]
Length = Annotated[int, Field(ge=1, le=2**24)]
Period = Annotated[int, Field(ge=1, le=10**9)]
Processes = Annotated[int, Field(ge=0, le=4096)]
# What a float32 can hold.
Rate = Annotated[float, Field(gt=0, le=1e38)]
NotNegative = Annotated[float, Field(ge=0, le=1e38)]
# What every generator of random numbers takes.
Seed = Annotated[int, Field(ge=0, lt=2**32)]
LENGTHS = tuple[Length, Length]
COUNTS = tuple[Count, Count]
NAME_LENGTH = 64

# What an arm may set for itself. The rest decides which tokens are seen and is the same for all arms.
ARM_TRAIN_KEYS = (
    "learning_rate",
    "schedule",
    "warmup",
    "decay",
    "min_lr_ratio",
    "weight_decay",
    "betas",
    "grad_clip",
    "trainable",
    "lora_rank",
    "lora_modules",
)
# The key of [model] that names a checkpoint to begin with; then it is the only one.
FROM = "from"
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Trainable = Literal["everything", "attention", "new", "lora"]
# Keys of [model] that are decided elsewhere in the recipe.
RESERVED_MODEL_KEYS = {
    "attention": "set it in [[arms]]",
    "attention_options": "set it in [[arms]]",
    "vocab_size": "it is the tokenizer's",
    "pad_token_id": "it is the tokenizer's",
    "bos_token_id": "it is the tokenizer's",
    "eos_token_id": "it is the tokenizer's",
}


class RecipeError(ValueError):
    """A recipe that cannot be run. The message is one sentence that names the file and the key to change."""


class RecipeTable(BaseModel):
    """A table of the recipe: unknown keys are errors, values are not converted from other types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _written(text: str) -> str:
    """A name of something that exists: not blank, and nothing that cannot be seen."""
    if not text.strip():
        raise ValueError("it is empty")
    if not text.isprintable():
        raise ValueError(f"{text!r} has a character that cannot be seen")
    return text


Written = Annotated[str, AfterValidator(_written)]


def _template(text: str) -> str:
    """A sentence around one {key} and then one {value}; other names in braces would stand in the text as they are."""
    found = re.findall(r"\{(?:[A-Za-z_][^{}]*)?\}", text)
    if found != ["{key}", "{value}"]:
        raise ValueError(
            f"{text!r} must name {{key}} once and then {{value}} once, and nothing else in braces"
        )
    return text


def _question(text: str) -> str:
    if not _template(text).endswith("{value}"):
        raise ValueError(f"{text!r} must end with {{value}}: the answer ends the document")
    return text


def _ordered(range_: tuple[int, int], what: str) -> None:
    if range_[0] > range_[1]:
        raise ValueError(f"{what} is [smallest, largest], got {list(range_)}")


class CorpusOptions(RecipeTable):
    """Where the text comes from; see `clearhead.data.corpora.open_corpus` for what a source can be."""

    source: Written = "stdlib"
    text_field: Written = "text"
    max_bytes: Annotated[int, Field(ge=1, lt=2**63)] | None = None
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    # Seed of the split by document, not the seed of a run, so that all seeds share one validation set.
    seed: Seed = 0


class TokenizerOptions(RecipeTable):
    """`bpe` trains a byte-level BPE on the training split; anything else is a Hugging Face path or id."""

    source: Written = "bpe"
    # At least 256 bytes and the special tokens; only for `bpe`.
    vocab_size: Annotated[int, Field(ge=260, le=10**7)] = 1024


class NeedleRows(RecipeTable):
    """The retrieval documents in training; see `clearhead.data.retrieval.NeedleRange`.

    A range is [smallest, largest]; lengths are drawn log-uniformly, counts uniformly.
    """

    lengths: LENGTHS = (32, 128)
    needles: COUNTS = (1, 16)
    pairs: COUNTS = (1, 4)  # facts of a pair document
    questions: Count = 4
    key_tokens: Annotated[int, Field(ge=1, le=1024)] = 2
    value_tokens: Annotated[int, Field(ge=1, le=1024)] = 2
    template: Annotated[str, AfterValidator(_template)] = "\n# {key}{value}"
    question: Annotated[str, AfterValidator(_question)] = "\n# {key}{value}"
    repeats: Share = 0.0  # of the pair rows: random words, twice, to be copied
    learn_context: bool = False  # also learn the text around the needles
    separate_words: bool = False  # keys and values are made of different words

    @model_validator(mode="after")
    def _check(self) -> Self:
        _ordered(self.lengths, "lengths")
        _ordered(self.needles, "needles")
        _ordered(self.pairs, "pairs")
        return self


class Data(RecipeTable):
    """What a row of `length` tokens is: text, retrieval documents or shuffled pairs, by share of the rows."""

    length: Annotated[int, Field(ge=8, le=2**24)] = 256
    document_masks: bool = True
    needle_share: Share = 0.0
    pair_share: Share = 0.0
    # Share of the rows, at the beginning, that are pairs alone; after them the shares above hold.
    pairs_first: Annotated[float, Field(ge=0, lt=1)] = 0.0
    needles: NeedleRows = NeedleRows()
    # JSON lines with messages, or prompt and completion, instead of all of that; the corpus is then for evaluations.
    instructions: Written | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.instructions is not None and self.needle_share + self.pair_share + self.pairs_first > 0:
            raise ValueError("instructions take all rows: leave out needle_share, pair_share and pairs_first")
        if self.needle_share + self.pair_share > 1:
            raise ValueError(
                f"needle_share + pair_share is {self.needle_share + self.pair_share:g}; they are shares of the rows "
                "and cannot exceed 1"
            )
        if self.needle_share + self.pair_share > 0 and self.needles.lengths[0] > self.length:
            raise ValueError(
                f"needles.lengths starts at {self.needles.lengths[0]}, longer than a row (length = {self.length})"
            )
        return self


class Train(RecipeTable):
    """Budget, optimiser and bookkeeping of one training run. Budgets are in tokens, periods in optimiser steps."""

    tokens: Tokens = 5_000_000
    batch_tokens: Annotated[int, Field(ge=1, le=2**31)] = 4096
    learning_rate: Rate = 1e-3
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    warmup: Share = 0.05  # share of the steps
    decay: Annotated[float, Field(gt=0, lt=1)] = (
        0.2  # of "wsd": the share of the steps, at the end, in which it falls
    )
    min_lr_ratio: Share = 0.1  # the schedule ends at this share of learning_rate
    weight_decay: NotNegative = 0.1
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    grad_clip: NotNegative = 1.0  # 0 = off
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    save_every: Period = 200
    log_every: Period = 10
    # Steps between measurements of retrieval accuracy while training; 0 = never.
    probe_every: Annotated[int, Field(ge=0, le=10**9)] = 0
    mastery: Annotated[float, Field(gt=0, le=1)] = 0.9  # the probe accuracy that counts as mastered
    stop_at_mastery: bool = False
    # Of a model that begins with a checkpoint: all of it, its attention, what a retrofit added, or that and LoRA.
    trainable: Trainable = "everything"
    lora_rank: Annotated[int, Field(ge=1, le=2**14)] = 8
    lora_modules: tuple[Written, ...] = LINEAR
    threads: Processes = 1  # per job; 0 = cores // workers
    workers: Processes = 0  # jobs side by side; 0 = number of cores
    # Where a run is logged beside metrics.jsonl: "tensorboard" (in the job's directory) and whatever Hugging Face's
    # Trainer knows and is installed: "wandb", "mlflow", "trackio", ...
    report_to: list[Annotated[str, AfterValidator(_written)]] = ["tensorboard"]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.stop_at_mastery and not self.probe_every:
            raise ValueError("stop_at_mastery needs probe_every > 0")
        return self

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole budget; the last one completes it."""
        return math.ceil(self.tokens / self.batch_tokens)

    @property
    def decay_start(self) -> int:
        """The step from which "wsd" falls; up to it a training with a larger budget is the same."""
        return self.steps - max(1, round(self.decay * self.steps))


class Evaluate(BaseModel):
    """Which evaluations run, and a table of options for any of them, checked by that evaluation's own `Config`."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)
    __pydantic_extra__: dict[str, dict[str, Any]]

    suites: list[str] = ["language_modelling", "loss_by_position", "needles", "allocation"]

    def options(self, suite: str) -> dict[str, Any]:
        """The options given for `suite`; empty when there is no such table."""
        return self.__pydantic_extra__.get(suite, {})


class Sweep(RecipeTable):
    """Choose each arm's learning rate on its own seeds before the compared seeds run. See `clearhead.train.sweep`."""

    learning_rate: Annotated[list[Rate], Field(min_length=2)]
    seeds: Annotated[list[Seed], Field(min_length=1)]
    tokens: Tokens | None = None  # budget of a sweep run; default: the main budget

    @model_validator(mode="after")
    def _check(self) -> Self:
        # As they stand in the names of directories.
        if len({f"{rate:g}" for rate in self.learning_rate}) < len(self.learning_rate):
            raise ValueError("learning_rate names a value twice (six digits count)")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds names a seed twice")
        return self


class ArmRetrofit(RecipeTable):
    """Differential attention in the checkpoint that `model.from` names; see `clearhead.convert.retrofit`."""

    attention: Written
    init: Written | None = None
    layers: Literal["all", "upper", "alternate"] | list[int] = "all"
    options: dict[str, Any] = {}
    heads: Annotated[float, Field(gt=0, le=1)] = 0.5


class Scaling(RecipeTable):
    """The grid of `clearhead scale` around the base shape, which is [model]; its rules: `clearhead.runs.grid`."""

    widths: Annotated[list[Count], Field(min_length=1)]
    budgets: Annotated[list[Tokens], Field(min_length=1)]  # all of them decay off one trunk
    depth_power: Annotated[float, Field(ge=0, le=4)] = 1.0
    rate_power: Annotated[float, Field(ge=0, le=4)] = 1.0
    learning_rate: list[Rate] | None = None  # tuned, one a width; left out: transferred by rate_power

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("widths", "budgets"):
            values = getattr(self, name)
            if values != sorted(set(values)):
                raise ValueError(f"{name} must rise from one to the next, got {values}")
        if self.learning_rate is not None and len(self.learning_rate) != len(self.widths):
            raise ValueError(
                f"learning_rate has {len(self.learning_rate)} values; expected {len(self.widths)}, one a width"
            )
        return self


class Arm(RecipeTable):
    """One side of the comparison: an attention variant and what differs with it."""

    name: Annotated[str, Field(max_length=NAME_LENGTH), AfterValidator(_written)]
    attention: str = "softmax"
    attention_options: dict[str, Any] = {}
    model: dict[str, Any] = {}  # overrides of [model]
    train: dict[str, Any] = {}  # overrides of [train], only the keys in ARM_TRAIN_KEYS
    retrofit: ArmRetrofit | None = None  # with model.from alone

    @property
    def slug(self) -> str:
        """The name as a directory name."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


class Job(RecipeTable):
    """One arm with one seed, resolved: nothing of the recipe has to be looked up any more. This is `job.json`."""

    recipe: str
    arm: str
    slug: str
    seed: int
    corpus: CorpusOptions
    tokenizer: TokenizerOptions
    data: Data
    model: dict[str, Any]  # keyword arguments of ClearheadConfig, all but vocab_size
    train: Train
    evaluate: Evaluate
    start: str | None = None  # the checkpoint that training begins with
    retrofit: ArmRetrofit | None = None
    branches: tuple[int, ...] = ()  # budgets that decay off this training (`clearhead.train.branching`)

    @property
    def attention(self) -> str:
        """Name of the attention variant."""
        return str(self.model["attention"])

    @property
    def steps(self) -> int:
        """Optimiser steps to take; with branches, those of the trunk once and every branch's decay."""
        if not self.branches or self.train.schedule != "wsd":
            return self.train.steps
        budgets = [self.train.model_copy(update={"tokens": tokens}) for tokens in self.branches]
        return self.train.decay_start + sum(budget.steps - budget.decay_start for budget in budgets)


class Recipe(RecipeTable):
    """A comparison: one corpus, one mixture of rows, one budget, several arms and seeds."""

    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$", max_length=NAME_LENGTH)]
    description: str = ""
    seeds: Annotated[list[Seed], Field(min_length=1)] = [0]
    corpus: CorpusOptions = CorpusOptions()
    tokenizer: TokenizerOptions = TokenizerOptions()
    data: Data = Data()
    model: dict[str, Any] = {}
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    sweep: Sweep | None = None
    scaling: Scaling | None = None
    arms: Annotated[list[Arm], Field(min_length=1)]

    def arm(self, name: str) -> Arm:
        """The arm with this name or slug; RecipeError when there is none."""
        for arm in self.arms:
            if name in (arm.name, arm.slug):
                return arm
        raise RecipeError(
            f"recipe {self.name!r} has no arm {name!r}; it has {', '.join(repr(arm.name) for arm in self.arms)}"
        )

    def model_of(self, arm: Arm) -> dict[str, Any]:
        """Keyword arguments of ClearheadConfig for `arm`, all but vocab_size; with model.from, its attention alone."""
        if arm.retrofit is not None:
            return {"attention": arm.retrofit.attention, "attention_options": arm.retrofit.options}
        own = {"attention": arm.attention, "attention_options": arm.attention_options}
        return own if FROM in self.model else {**self.model, **arm.model, **own}

    def start_of(self, seed: int) -> str | None:
        """The checkpoint that training with `seed` begins with: model.from, in which {seed} stands for the seed."""
        found = self.model.get(FROM)
        return None if found is None else str(found).replace("{seed}", str(seed))

    def for_arm(
        self, name: str, seed: int, *, learning_rate: float | None = None, tokens: int | None = None
    ) -> Job:
        """The job of one arm and one seed. `learning_rate` and `tokens` replace the recipe's (a sweep sets them)."""
        arm = self.arm(name)
        train: dict[str, Any] = {**self.train.model_dump(), **tuples(arm.train)}
        if learning_rate is not None:
            train["learning_rate"] = learning_rate
        if tokens is not None:
            train["tokens"] = tokens
        return Job(
            recipe=self.name,
            arm=arm.name,
            slug=arm.slug,
            seed=seed,
            corpus=self.corpus,
            tokenizer=self.tokenizer,
            data=self.data,
            model=self.model_of(arm),
            train=Train.model_validate(train),
            evaluate=self.evaluate,
            start=self.start_of(seed),
            retrofit=arm.retrofit,
        )


def tuples(table: Mapping[str, Any]) -> dict[str, Any]:
    """`table` with its lists as tuples, as the strict models take them from Python."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}
