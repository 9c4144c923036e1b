"""A model shared out over processes by PyTorch's FSDP2: its sharding, its checkpoints, and all of it at the end.

A checkpoint that N processes wrote is read by any other number. Weights and moments are PyTorch's distributed
checkpoints in safetensors files: each process writes its rows of every tensor, with their place in the file's header,
and reads the rows it needs. The rest is JSON and one safetensors file. PyTorch's usual format has an index that is a
pickle; this one has none.
"""

import copy
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel
from transformers.distributed.configuration_utils import DistributedConfig

from clearhead.models.blocks import ClearheadLayer
from clearhead.train.checkpoint import BUFFERS, OPTIMISER, VALUES, WEIGHTS


def shard(model: PreTrainedModel, device: str) -> None:
    """Share `model` out over all processes: gathered layer by layer, and embeddings, last norm and head together.

    device: "cpu" or "cuda". In one group with the head, an embedding that is its matrix too stays one parameter.
    """
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for layer in [module for module in model.modules() if isinstance(module, ClearheadLayer)]:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    # By these transformers' Trainer knows a model that is sharded already, and defers its reduction of gradients.
    marked: Any = model
    marked._is_distributed_loading_by_transformers = True
    marked._is_fsdp_managed_module = True
    model.config.distributed_config = DistributedConfig(fsdp_size=dist.get_world_size())


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether `shard` has been called on it."""
    return isinstance(model, FSDPModule)


def save_weights(folder: Path, model: PreTrainedModel) -> None:
    """Write parameters and buffers; every process calls this."""
    folder.mkdir(parents=True, exist_ok=True)
    _save(folder / WEIGHTS, {name: weight.detach() for name, weight in model.named_parameters()})
    if _first():
        # A state dict leaves out the buffers that are not saved.
        buffers = model.state_dict().keys() & dict(model.named_buffers()).keys()
        save_file({name: model.get_buffer(name).cpu().contiguous() for name in buffers}, folder / BUFFERS)


def load_weights(folder: Path, model: PreTrainedModel) -> None:
    """Read what `save_weights` wrote, whatever the number of processes was; every process calls this."""
    _load(folder / WEIGHTS, {name: weight.detach() for name, weight in model.named_parameters()})
    for name, value in load_file(folder / BUFFERS).items():
        model.get_buffer(name).copy_(value)


def save_moments(folder: Path, model: PreTrainedModel, optimizer: Optimizer, schedule: LRScheduler) -> None:
    """Write the states of optimiser and schedule, by the names of parameters; every process calls this."""
    tensors: dict[str, Tensor] = {}
    steps: dict[str, float] = {}
    for name, weight in model.named_parameters():
        for key, value in optimizer.state.get(weight, {}).items():
            if key == "step":
                steps[name] = float(value)
            else:
                tensors[f"{name}.{key}"] = value
    _save(folder / OPTIMISER, tensors)
    if _first():
        groups = [
            {key: value for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        ]
        course = {key: value for key, value in schedule.state_dict().items() if key != "lr_lambdas"}
        values = {"steps": steps, "tensors": sorted(tensors), "groups": groups, "schedule": course}
        (folder / VALUES).write_text(json.dumps(values), encoding="utf-8")


def load_moments(folder: Path, model: PreTrainedModel, optimizer: Optimizer, schedule: LRScheduler) -> None:
    """Read what `save_moments` wrote, whatever the number of processes was; every process calls this."""
    values = json.loads((folder / VALUES).read_text(encoding="utf-8"))
    named = dict(model.named_parameters())
    tensors: dict[str, Tensor] = {}
    for full in values["tensors"]:
        name, _, key = full.rpartition(".")
        tensors[full] = torch.zeros_like(named[name])
        # Of one place with its weight, as the fused AdamW wants it.
        step = torch.tensor(values["steps"][name], dtype=torch.float32, device=named[name].device)
        optimizer.state.setdefault(named[name], {"step": step})[key] = tensors[full]
    _load(folder / OPTIMISER, tensors)
    for group, saved in zip(optimizer.param_groups, values["groups"], strict=True):
        group.update(saved)
    schedule.load_state_dict({**schedule.state_dict(), **values["schedule"]})


def gathered(model: PreTrainedModel) -> PreTrainedModel | None:
    """The whole model in the memory of the first process, None in the others; every process calls this."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    if not _first():
        return None
    config = copy.deepcopy(model.config)
    config.distributed_config = None
    kind: Any = next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))
    with torch.device("meta"):
        whole: PreTrainedModel = kind(config)
    whole.load_state_dict(state, assign=True)
    whole.tie_weights()
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    for name, weight in whole.named_parameters():
        weight.requires_grad_(name in trained)
    return whole


def _first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _save(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with _alone():
        save(dict(tensors), storage_writer=writer, no_dist=not dist.is_initialized())


def _load(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Into the tensors given."""
    reader = HuggingFaceStorageReader(str(folder))
    with _alone():
        load(dict(tensors), storage_reader=reader, no_dist=not dist.is_initialized())


@contextmanager
def _alone() -> Iterator[None]:
    """Without being told, at every checkpoint, that a single process is one; errors are the first process's own.

    PyTorch's error of a checkpoint, which a full disk is too, is no Exception: nobody who waits for one would see it.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield
        except CheckpointException as error:
            first: BaseException = error.failures[min(error.failures)][0]
            raise first from error
