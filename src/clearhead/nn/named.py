"""`Attention` with another variant than softmax's for good, by the name of its mechanism."""

from clearhead.nn.attention import Attention


class DifferentialAttention(Attention):
    """Differential attention V1: (softmax(q1 k1ᵀ/√D) − λ softmax(q2 k2ᵀ/√D)) v, normed per head, × (1 − λ_init).

    Replaces a Transformer layer of the same `num_heads`, `num_kv_heads` and `head_dim` (both head counts even) at
    the same projection sizes, plus 6 · head_dim parameters: it has num_heads / 2 heads with values 2 · head_dim
    wide. Options (lambda_init, head_norm, norm_eps, lambda_std), formula, sources and differences from the released
    code: `variants.differential.Differential`; the other arguments: `Attention`.
    """

    variant_name = "differential"


class DifferentialAttentionV2(Attention):
    """Differential attention V2: softmax(q_2i kᵀ/√D) v − sigmoid(λ_i(x)) softmax(q_2i+1 kᵀ/√D) v.

    num_heads output heads from 2 · num_heads query heads; keys, values and cache are the Transformer's. Formula,
    sources and differences from the released code: `variants.differential_v2.DifferentialV2`; the arguments:
    `Attention`.
    """

    variant_name = "differential_v2"


class CollinearAttention(Attention):
    """Collinear constrained attention: softmax(Σ_j t_j |q_j|² cos((m − n) θ_j) / √D) v in mode "exact".

    Same parameters as the Transformer layer it replaces; position must rotate. Options (mode, activation), sources and
    differences from the released code: `variants.collinear.Collinear`; the other arguments: `Attention`.
    """

    variant_name = "collinear"


class DifferentialCollinearAttention(Attention):
    """Differential attention V1 whose two streams are both collinear, each to its own key.

    Same head counts and parameters as `DifferentialAttention`; position must rotate. Options (mode, activation and
    those of `DifferentialAttention`), formula and sources: `variants.differential_collinear.DifferentialCollinear`; the
    other arguments: `Attention`.
    """

    variant_name = "differential_collinear"


class DifferentialCollinearAttentionV2(Attention):
    """Differential attention V2 whose two query streams are collinear to their shared key.

    Same head counts and parameters as `DifferentialAttentionV2`; position must rotate. Options (mode, activation),
    formula and sources: `variants.differential_collinear.DifferentialV2Collinear`; the other arguments: `Attention`.
    """

    variant_name = "differential_v2_collinear"


class DexAttention(Attention):
    """DEX: softmax attention whose chosen heads O become O − λ(t) · O W_D while λ is annealed.

    For models that exist already; it starts as the Transformer's layer and keeps its projections. Options (heads,
    anneal, lambda_init, weight_std), formula and source: `variants.dex.Dex`; the other arguments: `Attention`.
    """

    variant_name = "dex"


class DiffLoraAttention(Attention):
    """DiffLoRA: softmax(q1 k1ᵀ/√D) v − λ softmax(q2 k2ᵀ/√D) v with q2 and k2 of low rank.

    For models that exist already; values and output projection are the Transformer's. Options (rank, alpha, both,
    lambda_init, lambda_learned, lambda_std, lambda_warmup), formula and source: `variants.diff_lora.DiffLora`; the
    other arguments: `Attention`.
    """

    variant_name = "diff_lora"
