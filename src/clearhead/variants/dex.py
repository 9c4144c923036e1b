"""DEX: a pretrained attention's output minus a learned projection of itself."""

import torch
from torch import Tensor, nn

from clearhead.core.streams import HeadShape, Widths, check_whole, twin_widths
from clearhead.variants.base import Variant
from clearhead.variants.learned_lambda import LambdaInit, initial_lambda
from clearhead.variants.schedule import TrainingProgress


class DexFactor(nn.Module):
    """λ(t) of equation 4, (1,), in float32 at least."""

    def __init__(self, initial: float, anneal: int) -> None:
        super().__init__()
        self.initial = initial
        self.lambda_learn = nn.Parameter(torch.zeros(1))
        self.schedule = TrainingProgress(anneal)

    def forward(self) -> Tensor:
        learned = self.lambda_learn.to(torch.promote_types(self.lambda_learn.dtype, torch.float32))
        alpha = self.schedule().to(learned.dtype)
        return (1.0 - alpha) * alpha * self.initial + alpha * learned


class DexSubtraction(nn.Module):
    """O − λ(t) · O W_D for chosen heads. weight (E, E) is W_D, one for all heads of the layer."""

    def __init__(self, width: int, heads: tuple[int, ...] | None, initial: float, anneal: int) -> None:
        super().__init__()
        self.heads = heads
        self.weight = nn.Parameter(torch.empty(width, width))
        self.factor = DexFactor(initial, anneal)

    def forward(self, o: Tensor) -> Tensor:
        """(B, H, L, E) -> the same."""
        factor = self.factor()
        if self.heads is None:
            return o - (factor * (o @ self.weight)).to(o.dtype)
        # Made here and handed over: a tensor made on the device of `o` would wait for it.
        chosen = torch.tensor(self.heads).to(o.device, non_blocking=True)
        taken = factor * (o.index_select(1, chosen) @ self.weight)
        return o.index_add(1, chosen, -taken.to(o.dtype))


class Dex(Variant):
    """DEX (arXiv 2505.16333, "Understanding Differential Transformer Unchains Pretrained Self-Attentions").

        O'   = O − λ(t) · O W_D                                   for the chosen heads, O for the others
        λ(t) = (1 − α) · (t/T) · λ_init + α · λ_learn,            α = min(1, t/T), equation 4

    O is the softmax twin's head output, W_D (d, d) one matrix for all heads of the layer, t the optimiser step, λ_init
    `depth_lambda_init`. λ(0) = 0, so the layer starts as its twin whatever W_D is; the λ_init term rises, is largest at
    T/2 and gone at T. Queries, keys, values and cache are the twin's, and no new pattern of attention can come of it:
    with a learned λ, O' W_O is O times another matrix of the head. The layer gains d² + 1 parameters.

    heads:      numbers of the heads that it is applied to, all by default. The paper chooses them by a measurement
        whose details could not be had; `clearhead retrofit` takes those whose attention has the highest entropy.
    anneal:     T, in optimiser steps (`clearhead.variants.schedule.advance` tells the layer where training is).
    weight_std: W_D starts as N(0, weight_std²). The paper does not say; a start at 0 would leave λ_learn without a
        gradient in the first step.

    There is no released code.
    """

    float32_parameters = ("dex.factor.lambda_learn",)

    def __init__(
        self,
        shape: HeadShape,
        *,
        heads: list[int] | None = None,
        anneal: int = 1000,
        lambda_init: LambdaInit = "depth",
        weight_std: float = 0.02,
    ) -> None:
        super().__init__(shape)
        check_whole("anneal", anneal)
        if weight_std < 0:
            raise ValueError(f"weight_std must be at least 0, not {weight_std}")
        self.weight_std = weight_std
        chosen = None if heads is None else _chosen(heads, shape.num_heads)
        self.dex = DexSubtraction(
            shape.head_dim, chosen, initial_lambda(lambda_init, shape.layer_idx), anneal
        )
        self.reset_parameters()

    @classmethod
    def widths(cls, shape: HeadShape) -> Widths:
        return twin_widths(shape)

    def finish(self, o: Tensor) -> Tensor:
        finished: Tensor = self.dex(o)
        return finished

    def reset_parameters(self) -> None:
        nn.init.normal_(self.dex.weight, std=self.weight_std)
        nn.init.zeros_(self.dex.factor.lambda_learn)

    def mean_lambda(self) -> float:
        return float(self.dex.factor().detach())

    def flops_per_token(self, mean_keys: float) -> float:
        count = self.shape.num_heads if self.dex.heads is None else len(self.dex.heads)
        return 2.0 * count * self.dex.weight.numel()


def _chosen(heads: list[int], count: int) -> tuple[int, ...]:
    if not heads or len(set(heads)) < len(heads):
        raise ValueError(f"heads must name at least one head, and none twice; got {heads!r}")
    for head in heads:
        check_whole("each number in heads", head, 0)
        if head >= count:
            raise ValueError(f"heads names {head}, but the layer has the heads 0 to {count - 1}")
    return tuple(heads)
