"""Optimiser, schedule and random state on disk without pickle: safetensors for tensors, JSON for the rest.

A checkpoint counts only once its `complete` marker stands, so a process killed while writing leaves nothing that
would be resumed from. The marker holds a checksum of every file, and what does not agree with it is not resumed from.
"""

import json
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from clearhead.runs.checksums import fault, seal

MARKER = "complete"
# Of a model shared out over processes (`clearhead.train.sharded`, whose imports a single process can do without).
WEIGHTS = "weights"
OPTIMISER = "optimiser"
BUFFERS = "buffers.safetensors"
VALUES = "sharded.json"
_TENSORS = "optimizer.safetensors"
_VALUES = "optimizer.json"
_NEEDED = ("model.safetensors", _TENSORS, _VALUES, "random-0.safetensors", "trainer_state.json")
# Of a model shared out over processes; what these wrote is named by the checksums alone.
_NEEDED_SHARDED = (BUFFERS, VALUES, "random-0.safetensors", "trainer_state.json")


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


def save_random(folder: Path, rank: int, sums: Mapping[str, torch.Tensor]) -> None:
    """Write the state of torch's generators, nothing else in a step is random, and what the next record sums up."""
    states = {name: value.detach().cpu() for name, value in sums.items()} | {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    save_file(states, folder / f"random-{rank}.safetensors")


def load_random(folder: Path, rank: int) -> dict[str, torch.Tensor]:
    """Restore what `save_random` wrote and return the sums; a process that was not there before has the first one's."""
    path = folder / f"random-{rank}.safetensors"
    states = load_file(path if path.exists() else folder / "random-0.safetensors")
    torch.set_rng_state(states.pop("cpu"))
    cuda = states.pop("cuda", None)
    if cuda is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda)
    return states


def mark_complete(folder: Path) -> None:
    """Declare the checkpoint in `folder` fit to resume from: its files are on the disk and their checksums in it."""
    seal(folder, MARKER)


def drop_old(folder: Path, keep: int, kept: Collection[int] = ()) -> None:
    """Remove all but the `keep` latest checkpoints, by their numbers, for a clock may go back, and those of `kept`."""
    numbered = _numbered(folder)
    for number in sorted(set(numbered) - set(kept))[: -keep or None]:
        # Without its marker first: stopped half way, what is left is not taken for a checkpoint.
        (numbered[number] / MARKER).unlink(missing_ok=True)
        shutil.rmtree(numbered[number])


def newest_complete(folder: Path, say: Callable[[str], None], *, first: bool = True) -> Path | None:
    """The latest undamaged complete `checkpoint-N` in `folder`; half-written ones are removed.

    A damaged one is renamed, with a sentence, and the one before it taken; `first` is whether this process does so.
    """
    found = _numbered(folder)
    for number, path in list(found.items()):
        if not (path / MARKER).exists():
            del found[number]
            if first:
                shutil.rmtree(path)
    for number in sorted(found, reverse=True):
        path = found[number]
        reason = damage(path)
        if reason is None:
            if (path / MARKER).stat().st_size == 0:
                say(f"{path} was written without checksums; only the form of its files was checked")
            return path
        if first:
            say(f"{path} is damaged ({reason}); it is now {_put_aside(path).name} and an older one is tried")
    if found:
        say(f"no undamaged checkpoint is left in {folder}; training begins anew")
    return None


def damage(folder: Path) -> str | None:
    """What is wrong with a complete checkpoint, in a clause, or None."""
    if (reason := fault(folder, MARKER)) is not None:
        return reason
    sharded = (folder / WEIGHTS).is_dir() or (folder / VALUES).exists()
    for name in _NEEDED_SHARDED if sharded else _NEEDED:
        path = folder / name
        try:
            if path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            else:
                with safe_open(path, framework="pt"):
                    pass
        except FileNotFoundError:
            return f"{name} is missing"
        except (OSError, ValueError, SafetensorError) as error:
            return f"{name} cannot be read: {' '.join(str(error).split())}"
    return None


def _numbered(folder: Path) -> dict[int, Path]:
    """The folders `checkpoint-N` by their numbers."""
    names = ((path, re.fullmatch(r"checkpoint-(\d+)", path.name)) for path in folder.glob("checkpoint-*"))
    return {int(name[1]): path for path, name in names if name is not None}


def _put_aside(path: Path) -> Path:
    number = 0
    while (target := path.with_name(f"damaged-{path.name}{f'.{number}' if number else ''}")).exists():
        number += 1
    path.rename(target)
    return target
