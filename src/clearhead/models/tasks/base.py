"""What a recipe's `task` stands for: model, rows, loss and what is held out, in one class a task.

Legend: B batch, T labels of a row, V vocabulary or labels.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from clearhead.core.masks import packed_documents
from clearhead.data.packing import IGNORED, Example
from clearhead.models.config import ClearheadConfig
from clearhead.models.start import with_defaults
from clearhead.runs.recipe import RESERVED_MODEL_KEYS, Job, Recipe
from clearhead.runs.recipe_data import TaskName

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from clearhead.data.prepare import PreparedData


FIXED = {
    "model_type",
    "keys_to_ignore_at_inference",
    "base_model_pp_plan",
    "twin_heads",
    "sub_configs_defaults",
    "is_encoder_decoder",
    "sparse_prediction",
}


class TrainingRows(Protocol):
    """The rows of a whole budget; row i is a pure function of the job's seed and i."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...

    def kind(self, index: int) -> str:
        """What row `index` holds; bits per byte are logged of "text" alone."""
        ...


class Task(ABC):
    """One value of `task`.

    model_type, auto: the family of models, and the Auto class of transformers that makes them.
    what: what such a model is called in a sentence. forward: what a forward pass in training is told besides.
    decides: the beginning of the names of parameters that stand for the labels of the data.
    """

    name: ClassVar[TaskName]
    model_type: ClassVar[str]
    auto: ClassVar[str]
    what: ClassVar[str]
    forward: ClassVar[Mapping[str, Any]] = {}
    decides: ClassVar[tuple[str, ...]] = ()

    @property
    def config_class(self) -> type[ClearheadConfig]:
        """The configuration of the family."""
        from transformers import CONFIG_MAPPING

        import clearhead.models  # noqa: F401  registers the families

        found: Any = CONFIG_MAPPING[self.model_type]
        return found  # type: ignore[no-any-return]

    @property
    def auto_class(self) -> Any:
        """The Auto class itself."""
        import transformers

        import clearhead.models  # noqa: F401

        return getattr(transformers, self.auto)

    @property
    def model_class(self) -> type[PreTrainedModel]:
        """The class of the models."""
        found: type[PreTrainedModel] = self.auto_class._model_mapping[self.config_class]
        return found

    @property
    def keys(self) -> list[str]:
        """The keys of [model]: those of the configuration itself, not of its base class in transformers."""
        kinds = [kind for kind in self.config_class.__mro__ if kind.__module__.startswith("clearhead.")]
        found = {
            key: None
            for kind in reversed(kinds)
            for key, value in inspect.get_annotations(kind).items()
            if not str(value).startswith("typing.ClassVar") and key not in RESERVED_MODEL_KEYS
        }
        # Tokens are the tokenizer's; what a family is, is no choice.
        return [key for key in found if not key.endswith("_token_id") and key not in FIXED]

    def tables(self, model: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any], list[str]]]:
        """[model] and the tables of keys in it: name, table and the keys that it may have."""
        yield "model", model, self.keys

    def config(self, model: Mapping[str, Any], vocab_size: int, **tokens: Any) -> ClearheadConfig:
        """The configuration of a recipe's keys; `tokens`: the tokenizer's, and what the data decide (`also`)."""
        made = self.config_class(vocab_size=vocab_size, **model, **tokens)
        # What it costs depends on the head.
        made.architectures = [self.model_class.__name__]
        return made

    def complete(self, model: Mapping[str, Any], length: int) -> dict[str, Any]:
        """A recipe's keys with what it leaves out (`models.start`)."""
        return with_defaults(model, length, self.config_class)

    def planned(self, recipe: Recipe, model: Mapping[str, Any]) -> ClearheadConfig:
        """The configuration that a job of the recipe will have, but for the tokenizer's real size."""
        chosen = self.complete(model, recipe.data.length)
        return self.config(chosen, recipe.tokenizer.vocab_size, **self.also(recipe))

    def untrained(self, job: Job, data: PreparedData) -> PreTrainedModel:
        """The untrained model of a job; the seed of torch's generator decides its weights.

        Where the recipe does not say so, weights start by the width (`models.start`).
        """
        tokenizer = data.tokenizer
        masks = hasattr(self.config_class, "mask_token_id")
        config = self.config(
            self.complete(job.model, job.data.length),
            len(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **({"mask_token_id": tokenizer.mask_token_id} if masks else {}),
            **self.also(job),
        )
        return self.model_class(config)

    def also(self, source: Recipe | Job) -> dict[str, Any]:
        """Keys of the configuration that the data decide. Raises CorpusError for examples that cannot be used."""
        return {}

    @abstractmethod
    def rows(self, job: Job, data: PreparedData) -> TrainingRows:
        """What the job trains on."""

    @abstractmethod
    def held_out(self, job: Job, data: PreparedData, count: int) -> list[Example]:
        """At most `count` rows that training never sees, the same for every arm, for a loss while it trains."""

    def labels(self, job: Job) -> tuple[str, ...]:
        """What the numbers of labels stand for; nothing where labels are tokens."""
        return ()

    def targets(self, labels: Tensor) -> Tensor:
        """The labels (B, T) that the logits (B, T, V) of the same places are asked for; −100 is ignored."""
        return labels

    def losses(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Nats (B, T) of each label, 0 where there is none, and whether there is one."""
        targets = self.targets(labels)
        nats = F.cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="none"
        )
        return nats.view_as(targets), targets != IGNORED

    def bytes_per_label(self, job: Job, data: PreparedData) -> float | None:
        """Bytes of text that a label stands for on average; None where labels are no text."""
        return data.train.bytes_per_token

    def check(self, job: Job, data: PreparedData) -> None:
        """Raise ValueError, which names the key, for what would end a training at some row, or an evaluation."""
        self.rows(job, data)

    @abstractmethod
    def describe(self, job: Job, data: PreparedData) -> str:
        """What is trained on and held out, in a sentence."""


def mean_by_row(losses: Tensor, counted: Tensor) -> Tensor:
    """The mean over rows of each row's mean over its labels: what is minimised. losses, counted (B, T).

    A retrieval row has a dozen labels, a text row hundreds: by rows, the recipe's shares are shares of the loss.
    """
    return (losses.sum(dim=1) / counted.sum(dim=1).clamp(min=1)).mean()


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Rows as a batch; padding that all of them have at their end is cut off."""
    batch = {
        key: torch.stack([torch.from_numpy(row[key]) for row in rows]) for key in rows[0] if key != "is_text"
    }
    if "attention_mask" in batch:
        _cut(batch, int(batch["attention_mask"].sum(dim=1).max()), "input_ids", "attention_mask")
    if "decoder_input_ids" in batch:
        _cut(batch, int((batch["labels"] != IGNORED).sum(dim=1).max()), "labels", "decoder_input_ids")
    if "position_ids" in batch:
        _number(batch)
    if "is_text" in rows[0]:
        batch["is_text"] = torch.tensor([row["is_text"] for row in rows])
    return batch


def _number(batch: dict[str, Tensor]) -> None:
    """Say what the model would have to look at on its device, and wait for: whether a row has several documents."""
    positions = batch["position_ids"]
    if torch.equal(positions, torch.arange(positions.shape[1]).expand_as(positions)):
        del batch["position_ids"]
    else:
        batch["seq_idx"] = packed_documents(positions)


def _cut(batch: dict[str, Tensor], length: int, *keys: str) -> None:
    for key in keys:
        batch[key] = batch[key][:, :length].contiguous()
