"""Differential attention, V2."""

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

from torch import Tensor, nn

from clearhead.core.streams import HeadShape, Widths, closed_gate, split_heads, twin_widths
from clearhead.variants.base import Variant
from clearhead.variants.differential import every_second


class DifferentialV2(Variant):
    """Differential attention V2 (Microsoft, "Differential Transformer V2", January 2026).

        head_i = softmax(q_2i kᵀ / √d) v − sigmoid(λ_i(x)) · softmax(q_2i+1 kᵀ / √d) v

    A twin with h heads becomes h output heads fed by 2h query heads; heads 2i and 2i + 1 share a key-value head.
    λ(x) = x W_λ, one number a token and head, x the same normed input that the queries see. No head norm, no λ_init.
    The layer gains h·d·d_model (queries) and h·d_model (λ) parameters; keys, values, cache and output projection are
    the twin's.

    lambda_bias: λ(x) = x W_λ + b with one learned b a head that starts at this number; by default there is no b. A low
        one (−5: sigmoid 0.0067) starts with a second stream that is hardly heard.

    Differs from the released code: rotary pairs (j, j + d/2); sigmoid in float32; lambda_bias.
    """

    mixing = "difference"
    sigmoid_gate = True
    tensor_parallel: ClassVar[Mapping[str, str] | None] = {"lambda_proj": "colwise"}
    diagnostics_need_input = True

    def __init__(self, shape: HeadShape, *, lambda_bias: float | None = None) -> None:
        super().__init__(shape)
        known = lambda_bias is None or (
            isinstance(lambda_bias, int | float) and not isinstance(lambda_bias, bool)
        )
        if not known:
            raise ValueError(f"lambda_bias must be a number or None, not {lambda_bias!r}")
        self.lambda_bias = lambda_bias
        self.lambda_proj = nn.Linear(shape.embed_dim, shape.num_heads, bias=lambda_bias is not None)
        self.reset_parameters()

    @classmethod
    def widths(cls, shape: HeadShape) -> Widths:
        twin = twin_widths(shape)
        return replace(twin, q=2 * twin.q, query_streams=2)

    def split_queries(self, q: Tensor) -> tuple[Tensor, ...]:
        return split_heads(q, self.sizes.heads).chunk(2, dim=-1)

    def gate(self, x: Tensor | None) -> Tensor:
        return closed_gate(self.gate_logit(x))

    def gate_logit(self, x: Tensor | None) -> Tensor:
        # (B, L, H) -> (B, H, L, 1)
        raw: Tensor = self.lambda_proj(x)
        return raw.transpose(1, 2)[..., None]

    def reset_parameters(self) -> None:
        if self.lambda_bias is not None:
            nn.init.constant_(self.lambda_proj.bias, self.lambda_bias)

    def new_rows(self) -> dict[str, Tensor]:
        return {"q_proj": every_second(self.sizes.q, self.shape.head_dim)}
