"""A saved model of this library that a training of encoders or encoder-decoders begins with.

Weights that the task's model shares with it stay as they are, bit for bit. What the checkpoint does not have, the last
matrix of another head, is drawn anew with the job's seed, the same for every arm whose sizes are equal.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from clearhead.data.opening import open_pretrained
from clearhead.runs.checksums import check_model
from clearhead.runs.recipe import Job, Recipe

if TYPE_CHECKING:
    from clearhead.models.tasks.base import Task

INVALID = (ValueError, TypeError, ArithmeticError, RuntimeError, OSError, StrictDataclassError)
LISTED = 12


@dataclass(frozen=True)
class SavedModel:
    """A directory with a model of the task's family: as it was named, where its files are, what it is."""

    named: str
    folder: Path
    config: Any


def model_files(folder: Path) -> tuple[Path, ...]:
    """What decides the model in a directory: configuration, weights and their index, not a card or a tokenizer."""
    patterns = ("config.json", "*.safetensors", "*.safetensors.index.json")
    return tuple(file for pattern in patterns for file in sorted(folder.glob(pattern)))


def find_folder(named: str) -> Path:
    """The directory with config.json that `named` means, itself or its "model"; ValueError, with what is there."""
    path = Path(named).expanduser()
    if not path.is_dir():
        there = path
        while not there.is_dir() and there != there.parent:
            there = there.parent
        inside = sorted(entry.name for entry in there.iterdir() if entry.is_dir() and entry.name[0] != ".")
        more = f" and {len(inside) - LISTED} more" if len(inside) > LISTED else ""
        listed = f"{', '.join(inside[:LISTED])}{more}" if inside else "no directory"
        raise ValueError(f"there is no directory {named!r} to begin with; {str(there)!r} has {listed}")
    for folder in (path, path / "model"):
        if (folder / "config.json").is_file():
            return folder
    if runs := sorted(path.glob("arms/*/seed-*/model")):
        raise ValueError(f"{named!r} is a run; give one of its models, such as {str(runs[0])!r}")
    raise ValueError(f"{named!r} holds no model to begin with: it has no config.json")


def open_saved(named: str, task: Task) -> SavedModel:
    """The checkpoint that `named` means, its configuration read; ValueError unless it is of the task's family."""
    folder = find_folder(named)
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        found = raw["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{named!r} has a config.json that cannot be read ({error}); save it again"
        ) from None
    if found != task.model_type:
        raise ValueError(
            f'{named!r} is a {found!r} model; task = "{task.name}" begins with one of this library\'s '
            f"{task.model_type!r} models ({task.what})"
        )
    try:
        config = task.config_class.from_pretrained(folder, local_files_only=True)
    except INVALID as error:
        reason = error.__cause__ if isinstance(error, StrictDataclassError) and error.__cause__ else error
        raise ValueError(f"{named!r} has no configuration of this version: {reason}") from error
    return SavedModel(named, folder, config)


def begun_config(task: Task, saved: SavedModel, source: Recipe | Job) -> Any:
    """The checkpoint's configuration, with the labels of the data for a task that has labels."""
    made = type(saved.config).from_dict({**saved.config.to_dict(), **task.also(source)})
    made.architectures = [task.model_class.__name__]
    return made


def keeps_head(task: Task, saved: SavedModel, source: Recipe | Job) -> bool:
    """Whether the checkpoint has the task's own head already, for the same labels with the same numbers."""
    if (saved.config.architectures or [None])[0] != task.model_class.__name__:
        return False
    wanted: Mapping[int, str] | None = task.also(source).get("id2label")
    return wanted is None or saved.config.id2label == wanted


def begin(task: Task, saved: SavedModel, job: Job) -> tuple[Any, tuple[str, ...]]:
    """The job's model in float32 with the checkpoint's weights, and the names of the parameters drawn anew.

    Opened by the task's Auto class; nothing is unpickled and no code of the checkpoint is run. Raises BrokenFile for
    files that are not as they were written, ValueError where parts of the model itself are missing.
    """
    check_model(saved.folder)
    config = begun_config(task, saved, job)
    try:
        with _without_report():
            model, info = open_pretrained(
                task.auto_class,
                saved.folder,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                local_files_only=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except INVALID as error:
        raise ValueError(f"{saved.named!r} cannot be opened: {' '.join(str(error).split())}") from error
    fresh = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    trunk = f"{model.base_model_prefix}."
    others = {key for key in info["unexpected_keys"] if key.startswith(trunk)}
    if broken := sorted(key for key in fresh | others if key.startswith(trunk)):
        what = "does not fit its own configuration" if broken[0] in others else "lacks weights"
        raise ValueError(f"{saved.named!r} {what} ({broken[0]}, {len(broken)} such); save it again")
    if not keeps_head(task, saved, job):
        fresh |= {name for name, _ in model.named_parameters() if name.startswith(task.decides)}
    names = tuple(name for name, _ in model.named_parameters() if name in fresh)
    _draw(model, names, job.seed)
    return model, names


@contextmanager
def _without_report() -> Iterator[None]:
    """transformers warns of every head that is not in the file; what is missing is looked at here."""
    log = logging.getLogger("transformers.modeling_utils")
    # Not by its level: one of its own makes transformers report every model as one that was not sharded.
    log.addFilter(_is_error)
    try:
        yield
    finally:
        log.removeFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


@torch.no_grad()
def _draw(model: Any, names: tuple[str, ...], seed: int) -> None:
    """Fill the parameters `names` as in an untrained model; what is drawn depends on the seed and their sizes alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for owner in dict.fromkeys(name.rpartition(".")[0] for name in names):
            part: nn.Module = model.get_submodule(owner)
            # A copy, for parameters that were read are marked and would be passed over.
            made = copy.deepcopy(part)
            for inner in made.modules():
                inner.__dict__.pop("_is_hf_initialized", None)
            for parameter in made.parameters():
                parameter.__dict__.pop("_is_hf_initialized", None)
            model._init_weights(made)
            for key, parameter in part.named_parameters(recurse=False):
                if f"{owner}.{key}" in names:
                    parameter.copy_(made.get_parameter(key))
