"""A LoRA adapter's directory: evaluated with the model that it was trained on, merged into its weights."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from clearhead.evals.reasons import reason_of
from clearhead.extras import need

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def is_adapter(source: str | Path) -> bool:
    """Whether `source` is a directory that PEFT saved an adapter in, and no model of its own."""
    folder = Path(source)
    if not (folder / CONFIG).is_file():
        return False
    # Some programs save the base's configuration beside the adapter; only weights make a model of it.
    weights = (*folder.glob("model*.safetensors*"), *folder.glob("pytorch_model*"))
    return not (folder / "config.json").exists() or not weights


def settings(source: str | Path) -> dict[str, Any]:
    """What an adapter's configuration says. ValueError, naming the file, where it says nothing that can be read."""
    file = Path(source) / CONFIG
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"the adapter's {str(file)!r} cannot be read ({error}); get the adapter again"
        ) from error
    if not isinstance(found, dict):
        raise ValueError(f"the adapter's {str(file)!r} is no object; get the adapter again")
    return found


def base_of(source: str | Path) -> str:
    """The model that an adapter changes. ValueError where its directory does not name one."""
    base = settings(source).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(
            f"{str(source)!r} is an adapter and its {CONFIG} names no base model (base_model_name_or_path): write it "
            "there, or merge the adapter and evaluate the result"
        )
    # A relative path is as PEFT saved it, from where it ran; beside the adapter is the other place to look.
    beside = Path(source) / base
    return str(beside) if not Path(base).exists() and beside.exists() else base


def merged(model: Any, source: str | Path) -> Any:
    """The base `model` with the adapter in `source` merged into it; ValueError where it cannot be."""
    need(f"{str(source)!r} is an adapter; evaluating one", "adapters")
    if not (Path(source) / WEIGHTS).is_file():
        raise ValueError(
            f"the adapter in {str(source)!r} has no {WEIGHTS}: save it with safe_serialization=True; pickled weights "
            "are not loaded"
        )
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import SafetensorError, safe_open

    try:
        # Weights that are missing in the file are only warned of, and would be those of an untrained adapter.
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            adapted = PeftModel.from_pretrained(model, str(source))
        # Those that are left over are dropped without a word.
        own = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        with safe_open(Path(source) / WEIGHTS, framework="pt") as saved:
            unused = sorted(key for key in saved.keys() if "lora_" in key and key not in own)  # noqa: SIM118
        if unused:
            raise ValueError(f"{len(unused)} of its weights have no place there, {unused[0]} the first")
        merge = getattr(adapted, "merge_and_unload", None)
        if merge is None:
            raise ValueError(
                f"it is of the type {settings(source).get('peft_type')}, which cannot be merged into weights"
            )
        return merge()
    except (
        RuntimeError, ValueError, LookupError, TypeError, OSError, AttributeError, SafetensorError, UserWarning
    ) as error:  # fmt: skip
        raise ValueError(
            f"the adapter in {str(source)!r} does not fit {base_of(source)!r}: {reason_of(error)}"
        ) from error
