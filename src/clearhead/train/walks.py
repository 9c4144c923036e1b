"""What Trainer does to a whole model in every step, without walks over all its modules."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from clearhead.train.sharded import is_sharded


@contextmanager
def fewer_walks(model: nn.Module) -> Iterator[None]:
    """While the block runs, a mode that `model` has already is not set again, and its gradients are freed from a list.

    What `train` and `zero_grad` do is as it was; modules that are put into another mode than their model stay in it.
    """
    if is_sharded(model):
        # Its parameters are not always the same ones.
        yield
        return
    parameters, own = list(model.parameters()), model.train

    def train(mode: bool = True) -> nn.Module:
        return model if model.training is mode else own(mode)

    def zero_grad(set_to_none: bool = True) -> None:
        for parameter in parameters:
            if set_to_none:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.detach_().zero_()

    there = vars(model)
    there["train"], there["zero_grad"] = train, zero_grad
    try:
        yield
    finally:
        del there["train"], there["zero_grad"]
