"""Modes and gradients of a model whose modules are not walked over in every step."""

import pytest
import torch
from torch import nn

from clearhead.train.walks import fewer_walks


class Stopped(Exception):
    pass


def test_a_mode_reaches_all_modules_when_it_changes_and_gradients_are_freed() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(), nn.Linear(2, 1)))
    model.eval()
    with pytest.raises(Stopped), fewer_walks(model):
        assert model.train() is model and all(module.training for module in model.modules())
        model.eval()
        assert not any(module.training for module in model.modules())
        model.train(True)
        assert all(module.training for module in model.modules())
        for nothing in (True, False):
            model(torch.ones(3, 2)).sum().backward()
            model.zero_grad(set_to_none=nothing)
            left = [p.grad for p in model.parameters()]
            assert all(gradient is None if nothing else not gradient.any() for gradient in left)
        assert nn.Sequential(model).train()[0] is model
        raise Stopped
    assert not {"train", "zero_grad"} & vars(model).keys()


def test_modules_are_not_asked_again_for_a_mode_that_they_have() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with fewer_walks(model):
        model[0].eval()
        model.train()
        assert not model[0].training
