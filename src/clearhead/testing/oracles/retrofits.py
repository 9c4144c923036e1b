"""What a plain model's attention can be turned into: DEX, DiffLoRA, and a λ that rises while a model trains.

DEX: "Understanding Differential Transformer Unchains Pretrained Self-Attentions", arXiv 2505.16333, equation 4 and
figure 9. DiffLoRA: arXiv 2507.23588, equations 3 and 4.
"""

import torch
from torch import Tensor

from .differential import lambda_value


def risen(value: float | Tensor, progress: float) -> Tensor:
    """λ so far: a share of its full value that grows linearly from 0 to 1."""
    whole = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
    return whole * min(1.0, progress)


def dex_lambda(progress: float, initial: float, learned: Tensor) -> Tensor:
    """λ(t) = (1 − α)(t/T) λ_init + α λ_learn with α = min(1, t/T)."""
    alpha = min(1.0, progress)
    return (1 - alpha) * progress * initial + alpha * learned.sum()


def dex_output(out: Tensor, matrix: Tensor, lam: Tensor, chosen: list[int]) -> Tensor:
    """O − λ O W_D for the chosen heads of (B, H, L, E), O for the others; W_D (E, E) is one for all of them."""
    heads = []
    for h in range(out.shape[1]):
        one = out[:, h]
        heads.append(one - lam * torch.einsum("ble,ef->blf", one, matrix) if h in chosen else one)
    return torch.stack(heads, dim=1)


def low_rank(x: Tensor, down: Tensor, up: Tensor, alpha: float) -> Tensor:
    """(α / r) x A B: x (B, L, d), A given as (r, d) and B as (n, r), as matrices (out, in)."""
    rank = down.shape[0]
    return alpha / rank * torch.einsum("bli,ri,nr->bln", x, down, up)


def diff_lora_parts(
    x: Tensor, weight: Tensor, plain: int, rank: int, alpha: float, up: Tensor, up_first: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Both streams of one projection, (B, L, plain) each.

    weight: W (plain, d), then A_2 (r, d) and, where the first stream has an adapter too, A_1 (r, d).
    """
    first = torch.einsum("bli,oi->blo", x, weight[:plain])
    second = low_rank(x, weight[plain : plain + rank], up, alpha)
    if up_first is not None:
        first = first + low_rank(x, weight[plain + rank :], up_first, alpha)
    return first, second


def diff_lora_lambda(weights: dict[str, Tensor], initial: float, progress: float) -> Tensor:
    """Equation 2 of the Differential Transformer, or λ_init alone where λ is not learned; risen so far."""
    if "lambda_q1" not in weights:
        return risen(initial, progress)
    q1, k1, q2, k2 = (weights[f"lambda_{name}"] for name in ("q1", "k1", "q2", "k2"))
    return risen(lambda_value(q1, k1, q2, k2, initial), progress)
