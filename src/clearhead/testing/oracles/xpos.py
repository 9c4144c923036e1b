"""xPos (arXiv 2212.10554): logits pair by pair, in a form that depends on the distance only.

    Σ_j ζ_j^((m − n)/scale_base) Re(q_j conj(k_j) e^{i (m − n) θ_j}),    ζ_j = (2j/D + γ)/(1 + γ)

The same decay multiplies each pair of the collinear logits (arXiv 2309.08646, equations 9 and 10).
"""

import cmath
import math

import torch
from torch import Tensor


def decay(j: int, D: int, distance: int, gamma: float, scale_base: float) -> float:
    zeta = (2 * j / D + gamma) / (1 + gamma)
    return math.exp(distance / scale_base * math.log(zeta))


def scores(
    q: Tensor,
    k: Tensor,
    query_positions: list[int],
    key_positions: list[int],
    kind: str = "softmax",
    base: float = 10_000.0,
    gamma: float = 0.4,
    scale_base: float = 512.0,
) -> Tensor:
    """(L, S) of q (L, D) and k (S, D), unscaled; of the kinds but softmax, k gives t = relu(mean of the pair)."""
    L, S, D = q.shape[0], k.shape[0], q.shape[1]
    found = torch.zeros(L, S, dtype=torch.float64)
    for row, m in enumerate(query_positions):
        for column, n in enumerate(key_positions):
            for j in range(D // 2):
                theta = base ** (-2 * j / D)
                one, other = float(q[row, j]), float(q[row, j + D // 2])
                first, second = float(k[column, j]), float(k[column, j + D // 2])
                t = max((first + second) / 2, 0.0)
                turn = cmath.exp(1j * (m - n) * theta)
                if kind == "softmax":
                    term = (complex(one, other) * complex(first, second).conjugate() * turn).real
                elif kind == "slack":
                    turned_query = complex(one, other) * cmath.exp(1j * m * theta)
                    turned_t = complex(t, t) * cmath.exp(1j * n * theta)
                    term = one * turned_query.real * turned_t.real + other * turned_query.imag * turned_t.imag
                else:
                    if kind == "strict":
                        one = other = (one + other) / 2
                    term = t * (one * one + other * other) * turn.real
                found[row, column] += decay(j, D, m - n, gamma, scale_base) * term
    return found
