"""The recipe of a comparison: every key, its default and what it means; and the single job that it resolves to.

Reading from TOML, overrides and writing are in `recipe_io`. Everything here is pure: no file, no model, no torch.
"""

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from clearhead.runs.recipe_data import CorpusOptions as CorpusOptions
from clearhead.runs.recipe_data import (
    Count,
    NotNegative,
    Period,
    Processes,
    Rate,
    Seed,
    Share,
    TaskName,
    Tokens,
    Written,
    check_task,
    written,
)
from clearhead.runs.recipe_data import Data as Data
from clearhead.runs.recipe_data import NeedleRows as NeedleRows
from clearhead.runs.recipe_data import RecipeError as RecipeError
from clearhead.runs.recipe_data import RecipeTable as RecipeTable
from clearhead.runs.recipe_data import TokenizerOptions as TokenizerOptions

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


class Parallel(RecipeTable):
    """How one training fills its devices; the rows of a step and their order are the same whatever it says."""

    fsdp: bool = False  # weights, gradients and moments shared out over the processes (FSDP2)
    rows: Annotated[int, Field(ge=0, le=2**20)] = 0  # of a device at a time; 0 = all of its share of a step
    checkpointing: bool = False  # activations computed again in the backward pass
    compile: bool = False  # torch.compile, layer by layer


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
    # Of a model that begins with a checkpoint: all of it, its attention, what is new, or that and LoRA.
    trainable: Trainable = "everything"
    lora_rank: Annotated[int, Field(ge=1, le=2**14)] = 8
    lora_modules: tuple[Written, ...] = LINEAR
    threads: Processes = 1  # per job; 0 = cores // workers
    workers: Processes = 0  # jobs side by side; 0 = number of cores
    parallel: Parallel = Parallel()
    # Where a run is logged beside metrics.jsonl: "tensorboard" (in the job's directory) and whatever Hugging Face's
    # Trainer knows and is installed: "wandb", "mlflow", "trackio", ...
    report_to: list[Written] = Field(default_factory=lambda: ["tensorboard"])

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.stop_at_mastery and not self.probe_every:
            raise ValueError("stop_at_mastery needs probe_every > 0")
        if self.parallel.fsdp and self.trainable in ("new", "lora"):
            raise ValueError(
                f'parallel.fsdp trains whole matrices, and trainable = "{self.trainable}" does not'
            )
        return self

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole budget; the last one completes it."""
        return math.ceil(self.tokens / self.batch_tokens)

    @property
    def decay_start(self) -> int:
        """The step from which "wsd" falls; up to it a training with a larger budget is the same."""
        return self.steps - max(1, round(self.decay * self.steps))


# What is evaluated where a recipe names nothing; the first is the task's headline.
SUITES: dict[TaskName, tuple[str, ...]] = {
    "causal": ("language_modelling", "loss_by_position", "needles", "allocation"),
    "masked": ("masked_language_modelling", "masked_by_length", "anomalous_cases"),
    "classify": ("classification", "anomalous_cases"),
    "seq2seq": ("target_modelling",),
}


class Evaluate(BaseModel):
    """Which evaluations run, and a table of options for any of them, checked by that evaluation's own `Config`."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)
    __pydantic_extra__: dict[str, dict[str, Any]]

    suites: list[str] = list(SUITES["causal"])

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
    options: dict[str, Any] = Field(default_factory=dict)
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

    name: Annotated[str, Field(max_length=NAME_LENGTH), AfterValidator(written)]
    attention: str = "softmax"
    attention_options: dict[str, Any] = Field(default_factory=dict)
    model: dict[str, Any] = Field(default_factory=dict)  # overrides of [model]
    train: dict[str, Any] = Field(
        default_factory=dict
    )  # overrides of [train], only the keys in ARM_TRAIN_KEYS
    retrofit: ArmRetrofit | None = None  # of causal, with model.from alone

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
    task: TaskName = "causal"
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
    task: TaskName = "causal"
    seeds: Annotated[list[Seed], Field(min_length=1)] = Field(default_factory=lambda: [0])
    corpus: CorpusOptions = CorpusOptions()
    tokenizer: TokenizerOptions = TokenizerOptions()
    data: Data = Data()
    model: dict[str, Any] = Field(default_factory=dict)
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    sweep: Sweep | None = None
    scaling: Scaling | None = None
    arms: Annotated[list[Arm], Field(min_length=1)]

    @model_validator(mode="after")
    def _task(self) -> Self:
        check_task(self.task, self.data)
        if self.task != "causal":
            if "suites" not in self.evaluate.model_fields_set:
                chosen = self.evaluate.model_copy(update={"suites": list(SUITES[self.task])})
                object.__setattr__(self, "evaluate", chosen)
            here = f'task = "{self.task}"'
            if self.train.stop_at_mastery:
                raise ValueError(f"{here} masters no retrieval: leave out train.stop_at_mastery")
            if self.scaling is not None:
                raise ValueError(f"{here} has no scaling study: leave out [scaling]")
        return self

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

    def start_of(self, arm: Arm, seed: int) -> str | None:
        """The checkpoint that training `arm` with `seed` begins with: model.from, {arm} being the arm's slug."""
        found = self.model.get(FROM)
        return None if found is None else str(found).replace("{seed}", str(seed)).replace("{arm}", arm.slug)

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
            task=self.task,
            corpus=self.corpus,
            tokenizer=self.tokenizer,
            data=self.data,
            model=self.model_of(arm),
            train=Train.model_validate(train),
            evaluate=self.evaluate,
            start=self.start_of(arm, seed),
            retrofit=arm.retrofit,
        )


def tuples(table: Mapping[str, Any]) -> dict[str, Any]:
    """`table` with its lists as tuples, as the strict models take them from Python."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}
