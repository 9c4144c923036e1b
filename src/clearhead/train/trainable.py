"""Which part of a model is trained: all of it, its attention, what a retrofit added, or that and LoRA on the rest."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor, nn

from clearhead.nn import ProjectedAttention
from clearhead.runs.recipe import Train


@dataclass
class TrainedPart:
    """What is trained of a model.

    partial: parameters of which some rows alone are trained; weight decay would move the others, so they have none.
    merge:   puts what was trained beside the model's weights (LoRA) into them; the model is then as it was built.
    """

    partial: list[nn.Parameter] = field(default_factory=list)
    merge: Callable[[], None] = lambda: None


def choose_part(model: nn.Module, train: Train, new: Collection[str] | None = None) -> TrainedPart:
    """Make `train.trainable` of `model` trainable and nothing else.

    "everything"; "attention", the attention of all layers; "new", the variants' own parameters and the rows of
    projections that a softmax model does not have; "lora", these and low-rank matrices (PEFT's LoRA, rank
    `lora_rank`, alpha twice that, no dropout) beside every matrix whose name is in `lora_modules`.

    new: names of the parameters that the checkpoint did not have (a head for other labels), where that is what is new,
        not the attention. They are trained whatever else is.

    Raises ValueError where nothing would be trained, and MissingExtra without PEFT.
    """
    if train.trainable == "everything":
        return TrainedPart()
    layers = [module for module in model.modules() if isinstance(module, ProjectedAttention)]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if train.trainable == "attention":
        for layer in layers:
            for parameter in layer.parameters():
                parameter.requires_grad_(True)
    if new is not None:
        return _with_head(model, train, new)
    if train.trainable == "attention":
        return TrainedPart()
    # Before anything is wrapped, while the projections have their names.
    rows = [
        (getattr(layer, name).weight, mask)
        for layer in layers
        for name, mask in layer.variant.new_rows().items()
    ]
    own = [parameter for layer in layers for parameter in layer.variant.parameters()]
    merge: Callable[[], None] = TrainedPart().merge
    if train.trainable == "lora":
        from clearhead.train.lora import add_lora

        merge = add_lora(model, train)
    elif not own:
        raise ValueError('train.trainable = "new": the model has nothing that a softmax model does not have')
    for parameter in own:
        parameter.requires_grad_(True)
    for parameter, mask in rows:
        parameter.requires_grad_(True)
        parameter.register_hook(partial(_masked, mask[:, None]))
    return TrainedPart([parameter for parameter, _ in rows], merge)


def _with_head(model: nn.Module, train: Train, new: Collection[str]) -> TrainedPart:
    """Make the parameters `new` trainable too, and beside them low-rank matrices where they are asked for."""
    # Before anything is wrapped, while they have their names.
    fresh = [parameter for name, parameter in model.named_parameters() if name in new]
    merge = TrainedPart().merge
    if train.trainable == "lora":
        from clearhead.train.lora import add_lora

        merge = add_lora(model, train)
    elif train.trainable == "new" and not fresh:
        raise ValueError('train.trainable = "new": the checkpoint has the head for these labels already')
    for parameter in fresh:
        parameter.requires_grad_(True)
    return TrainedPart(merge=merge)


def _masked(mask: Tensor, gradient: Tensor) -> Tensor:
    return gradient * mask.to(gradient.device)


def trained_numbers(model: nn.Module, part: TrainedPart) -> int:
    """How many numbers are trained."""
    partly = {id(parameter) for parameter in part.partial}
    found = sum(p.numel() for p in model.parameters() if p.requires_grad and id(p) not in partly)
    for layer in (module for module in model.modules() if isinstance(module, ProjectedAttention)):
        for name, mask in layer.variant.new_rows().items():
            weight = getattr(layer, name).weight
            found += int(mask.sum()) * weight.shape[1] if id(weight) in partly else 0
    return found
