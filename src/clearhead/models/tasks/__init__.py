"""What a model is trained for: one class a task, found by the name that recipes use."""

from typing import Any

from clearhead.models.tasks.base import Task, TrainingRows, collate, mean_by_row
from clearhead.models.tasks.causal import CausalTask
from clearhead.models.tasks.classify import ClassifyTask
from clearhead.models.tasks.masked import MaskedTask
from clearhead.models.tasks.seq2seq import Seq2SeqTask

__all__ = [
    "TASKS",
    "Task",
    "TrainingRows",
    "collate",
    "mean_by_row",
    "task_of",
    "task_of_config",
    "task_of_model",
]

TASKS: dict[str, Task] = {
    task.name: task for task in (CausalTask(), MaskedTask(), Seq2SeqTask(), ClassifyTask())
}


def task_of(name: str) -> Task:
    """The task of a recipe or a job, by its name."""
    return TASKS[name]


def task_of_model(config: Any) -> Task:
    """The task of any model that was saved: one of another library is taken for a causal language model.

    Raises ValueError as `task_of_config`.
    """
    from clearhead.models.autoload import FAMILIES

    return task_of_config(config) if config.model_type in FAMILIES else TASKS["causal"]


def task_of_config(config: Any) -> Task:
    """The task of a model by its configuration: of its saved class, or else the first of its family.

    Raises ValueError for a model that is none of this library's, or that has a head for something else.
    """
    saved = (config.architectures or [None])[0]
    alike = [task for task in TASKS.values() if task.model_type == config.model_type]
    for task in alike:
        if saved in (None, task.model_class.__name__):
            return task
    known = ", ".join(task.model_class.__name__ for task in TASKS.values())
    raise ValueError(f"a {saved or config.model_type!r} is none of the models that a task trains: {known}")
