"""RMSNorm in float32, as a module and as what a fused kernel needs of one."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / √(mean(x²) + eps) · weight over the last axis, the statistics in float32 (float64 for float64 inputs).

    One weight, shared by everything in front of the last axis. As in LLaMA: cast back first, then scale.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        scaled = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return scaled.to(x.dtype) * self.weight

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"


@dataclass(frozen=True, slots=True)
class HeadNorm:
    """factor · RMSNorm of each head's output, x / √(mean(x²) + eps) · weight, with weight (E,) for all heads."""

    weight: Tensor
    eps: float
    factor: float = 1.0

    @classmethod
    def of(cls, norm: nn.Module | None, factor: float = 1.0) -> "HeadNorm | None":
        """What `norm`, then `factor`, do; None for anything but a plain RMSNorm that nobody sees being called.

        Tools that keep weights elsewhere, sum gradients or look on do so when the module is called, so it must be.
        """
        if type(norm) is not RMSNorm or "forward" in vars(norm):
            return None
        hooks = (norm._forward_hooks, norm._forward_pre_hooks, norm._backward_hooks, norm._backward_pre_hooks)
        return None if any(len(hook) for hook in hooks) else cls(norm.weight, norm.eps, factor)
