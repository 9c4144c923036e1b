"""Optimiser, schedule and random state on disk without pickle: safetensors for tensors, JSON for the rest.

A checkpoint counts only once its `complete` marker stands, so a process killed while writing leaves nothing that
would be resumed from.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

MARKER = "complete"
_TENSORS = "optimizer.safetensors"
_VALUES = "optimizer.json"


def save_optimizer(folder: Path, optimizer: Optimizer, scheduler: LRScheduler) -> None:
    """Write both states; tensors are named `<parameter>.<key>`."""
    state = optimizer.state_dict()
    tensors = {
        f"{index}.{key}": torch.as_tensor(value).detach().cpu().contiguous()
        for index, entries in state["state"].items()
        for key, value in entries.items()
    }
    schedule = {key: value for key, value in scheduler.state_dict().items() if key != "lr_lambdas"}
    save_file(tensors, folder / _TENSORS)
    values = {"param_groups": state["param_groups"], "schedule": schedule}
    (folder / _VALUES).write_text(json.dumps(values), encoding="utf-8")


def load_optimizer(folder: Path, optimizer: Optimizer, scheduler: LRScheduler) -> None:
    """Restore what `save_optimizer` wrote."""
    values = json.loads((folder / _VALUES).read_text(encoding="utf-8"))
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in load_file(folder / _TENSORS).items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": values["param_groups"]})
    current = scheduler.state_dict()
    scheduler.load_state_dict({**current, **values["schedule"]})


def save_random(folder: Path, rank: int) -> None:
    """Write the state of torch's generators; nothing else in a training step is random."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    save_file(states, folder / f"random-{rank}.safetensors")


def load_random(folder: Path, rank: int) -> None:
    """Restore what `save_random` wrote; with more processes than before, new ones restore nothing."""
    path = folder / f"random-{rank}.safetensors"
    if not path.exists():
        return
    states = load_file(path)
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def mark_complete(folder: Path) -> None:
    """Declare the checkpoint in `folder` fit to resume from."""
    (folder / MARKER).touch()


def newest_complete(folder: Path) -> Path | None:
    """The latest complete `checkpoint-N` in `folder`; half-written ones are removed."""
    found: dict[int, Path] = {}
    for path in folder.glob("checkpoint-*"):
        number = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if number is None:
            continue
        if (path / MARKER).exists():
            found[int(number[1])] = path
        else:
            shutil.rmtree(path)
    return found[max(found)] if found else None
