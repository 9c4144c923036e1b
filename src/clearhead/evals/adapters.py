"""A LoRA adapter's directory: evaluated with the model that it was trained on, merged into its weights."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from clearhead.evals.results import read_json

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def is_adapter(source: str | Path) -> bool:
    """Whether ``source`` is a directory that PEFT saved an adapter in, and no model of its own."""
    folder = Path(source)
    return (folder / CONFIG).is_file() and not (folder / "config.json").exists()


def base_of(source: str | Path) -> str:
    """The model that an adapter changes. ValueError where its directory does not name one."""
    base = read_json(Path(source) / CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(
            f"{str(source)!r} is an adapter and its {CONFIG} names no base model (base_model_name_or_path): write it "
            "there, or merge the adapter and evaluate the result"
        )
    # A relative path is as PEFT saved it, from where it ran; beside the adapter is the other place to look.
    beside = Path(source) / base
    return str(beside) if not Path(base).exists() and beside.exists() else base


def merged(model: Any, source: str | Path) -> Any:
    """The base ``model`` with the adapter in ``source`` merged into it; ValueError where it cannot be."""
    if importlib.util.find_spec("peft") is None:
        raise ValueError(f"{str(source)!r} is an adapter, and evaluating one needs PEFT: pip install peft")
    if not (Path(source) / WEIGHTS).is_file():
        raise ValueError(
            f"the adapter in {str(source)!r} has no {WEIGHTS}: save it with safe_serialization=True; pickled weights "
            "are not loaded"
        )
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, str(source)).merge_and_unload()
    except (RuntimeError, ValueError, KeyError, OSError, AttributeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(
            f"the adapter in {str(source)!r} does not fit {base_of(source)!r}: {first}"
        ) from error
