"""Finding and loading a trained model from what a person typed."""

from pathlib import Path
from typing import Any


def model_directory(path: Path) -> Path:
    """`path` if it holds a model, else the `model` in it. Raises ValueError that says what is missing."""
    for candidate in (path, path / "model"):
        if (candidate / "config.json").exists():
            return candidate
    if not path.exists():
        raise ValueError(f"there is no model at {str(path)!r}")
    found = sorted(path.glob("arms/*/seed-*/model"))
    if found:
        raise ValueError(f"{str(path)!r} is a run with several models; give one, such as {str(found[0])!r}")
    raise ValueError(f"{str(path)!r} holds no model (no config.json); is its training finished?")


def load_model(path: Path) -> tuple[Any, Any]:
    """(model in evaluation mode, tokenizer). Raises ValueError for a model that writes no text of its own."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    from clearhead.data.opening import open_pretrained
    from clearhead.models.tasks import task_of_model
    from clearhead.runs.checksums import check_model

    directory = model_directory(path)
    disable_progress_bar()
    check_model(directory)
    task = task_of_model(open_pretrained(AutoConfig, directory))
    if task.name != "causal":
        raise ValueError(f"{str(directory)!r} is {task.what}; text is written by causal language models")
    model = open_pretrained(AutoModelForCausalLM, directory, use_safetensors=True)
    return model.eval(), open_pretrained(AutoTokenizer, directory)
