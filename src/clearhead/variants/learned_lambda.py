"""λ of equation 2 of the Differential Transformer: one number a layer, learned as a difference of exponentials."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from clearhead.core.streams import HeadShape, Widths, check_whole
from clearhead.variants.base import Variant
from clearhead.variants.schedule import TrainingProgress

LambdaInit = Literal["depth"] | float


def depth_lambda_init(layer_idx: int) -> float:
    """λ_init = 0.8 − 0.6 · exp(−0.3 · layer), the layer counted from 0 (the paper's l − 1): 0.2, 0.3555, 0.4707, ..."""
    return 0.8 - 0.6 * math.exp(-0.3 * layer_idx)


def initial_lambda(value: LambdaInit, layer_idx: int) -> float:
    """λ_init of a layer; ValueError for what is neither "depth" nor a number in [0, 1)."""
    known = value == "depth" if isinstance(value, str) else isinstance(value, int | float)
    if not known or isinstance(value, bool):
        raise ValueError(f'lambda_init must be "depth" or a number, not {value!r}')
    if isinstance(value, str):
        return depth_lambda_init(layer_idx)
    if not 0.0 <= value < 1.0:
        raise ValueError(f"lambda_init must be at least 0 and below 1, not {value}")
    return float(value)


class LearnedLambda(Variant):
    """A difference of two streams with one λ for all heads of the layer (arXiv 2410.05258, equation 2):

        λ = exp(λ_q1 · λ_k1) − exp(λ_q2 · λ_k2) + λ_init,    times min(1, step / warmup) where λ is warmed up

    The vectors start as N(0, lambda_std), are computed in float32 and take no weight decay. learned=False leaves them
    out: λ is λ_init.
    """

    mixing = "difference"
    float32_parameters = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")

    def __init__(
        self,
        shape: HeadShape,
        sizes: Widths | None,
        *,
        lambda_init: LambdaInit,
        lambda_std: float,
        warmup: int,
        learned: bool = True,
    ) -> None:
        super().__init__(shape, sizes)
        self.lambda_init = initial_lambda(lambda_init, shape.layer_idx)
        self.lambda_std = lambda_std
        self.learned = learned
        for name in self.float32_parameters if learned else ():
            self.register_parameter(name, nn.Parameter(torch.empty(shape.head_dim)))
        check_whole("lambda_warmup", warmup, 0)
        self.warmup = TrainingProgress(warmup) if warmup else None

    def lambda_full(self) -> Tensor:
        """λ of equation 2, a scalar in float32 (float64 for float64 parameters), before it is warmed up."""
        q1, k1, q2, k2 = (
            p if p.dtype == torch.float64 else p.float()
            for p in (getattr(self, name) for name in self.float32_parameters)
        )
        learned = (q1 * k1).sum().exp() - (q2 * k2).sum().exp()
        # As a vector of one: PyTorch makes the forward-mode derivative of a scalar and a number float64.
        return (learned.view(1) + self.lambda_init).view(())

    def gate(self, x: Tensor | None) -> Tensor:
        full = self.lambda_full() if self.learned else self._constant(x)
        so_far = full if self.warmup is None else full * self.warmup().to(full.dtype)
        return so_far.view(1, 1, 1, 1)

    def _constant(self, x: Tensor | None) -> Tensor:
        dtype = torch.float64 if x is not None and x.dtype == torch.float64 else torch.float32
        return torch.full((), self.lambda_init, dtype=dtype, device=None if x is None else x.device)

    def reset_parameters(self) -> None:
        for name in self.float32_parameters if self.learned else ():
            nn.init.normal_(getattr(self, name), std=self.lambda_std)

    def mean_lambda(self) -> float:
        return float(self(None).detach())
