"""Public layers and ways to call them, with the same call for the oracle of a whole layer."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from clearhead.nn import (
    Attention,
    CollinearAttention,
    DexAttention,
    DifferentialAttention,
    DifferentialAttentionV2,
    DifferentialCollinearAttention,
    DifferentialCollinearAttentionV2,
    DiffLoraAttention,
)
from clearhead.variants.schedule import TrainingProgress
from tests.contracts.support import distances, rand
from tests.oracles.layers import LayerSpec, layer

CLASSES = {
    "softmax": Attention,
    "differential": DifferentialAttention,
    "differential_v2": DifferentialAttentionV2,
    "collinear": CollinearAttention,
    "differential_collinear": DifferentialCollinearAttention,
    "differential_v2_collinear": DifferentialCollinearAttentionV2,
    "dex": DexAttention,
    "diff_lora": DiffLoraAttention,
}
B, L, S, WIDTH, D = 2, 5, 7, 10, 4


@dataclass(frozen=True)
class Case:
    """One layer: its options, its place, and how far its training is where it has a schedule."""

    attention: str
    options: dict[str, Any] = field(default_factory=dict)
    layer_idx: int = 1
    position: str = "rope"
    progress: float = 0.375


CASES = {
    "softmax": Case("softmax"),
    "softmax_nope": Case("softmax", position="nope"),
    "softmax_head_norm": Case("softmax", {"head_norm": True}),
    "differential": Case("differential"),
    "differential_first": Case("differential", layer_idx=0),
    "differential_nope": Case("differential", position="nope"),
    "differential_constant": Case("differential", {"lambda_init": 0.5}),
    "differential_bare": Case("differential", {"head_norm": False}),
    "differential_own": Case("differential", {"values": "own", "head_norm": False, "lambda_warmup": 10}),
    "differential_own_norm": Case("differential", {"values": "own", "lambda_init": 0.3}),
    "differential_risen": Case("differential", {"lambda_warmup": 10}, progress=1.0),
    "differential_v2": Case("differential_v2"),
    "differential_v2_bias": Case("differential_v2", {"lambda_bias": -5.0}),
    "differential_v2_nope": Case("differential_v2", position="nope"),
    "dex": Case("dex", {"heads": [0, 3]}),
    "dex_all": Case("dex", {"anneal": 5}, progress=0.75),
    "dex_annealed": Case("dex", {"heads": [1], "lambda_init": 0.5}, progress=1.0),
    "diff_lora": Case("diff_lora", {"rank": 3, "alpha": 4.5, "lambda_warmup": 7}),
    "diff_lora_both": Case("diff_lora", {"rank": 2, "alpha": 4.0, "both": True, "lambda_init": 0.1}),
    "diff_lora_fixed": Case(
        "diff_lora", {"rank": 2, "alpha": 4.0, "lambda_learned": False, "lambda_init": 0.1}
    ),
    "collinear": Case("collinear"),
    "collinear_softplus": Case("collinear", {"activation": "softplus"}),
    "collinear_slack": Case("collinear", {"mode": "slack"}),
    "collinear_strict": Case("collinear", {"mode": "strict"}),
    "differential_collinear": Case("differential_collinear"),
    "differential_collinear_slack": Case("differential_collinear", {"mode": "slack"}),
    "differential_collinear_strict": Case("differential_collinear", {"mode": "strict"}, layer_idx=0),
    "differential_collinear_bare": Case(
        "differential_collinear", {"head_norm": False, "lambda_init": 0.5, "activation": "softplus"}
    ),
    "differential_v2_collinear": Case("differential_v2_collinear"),
    "differential_v2_collinear_slack": Case("differential_v2_collinear", {"mode": "slack"}),
    "differential_v2_collinear_strict": Case(
        "differential_v2_collinear", {"mode": "strict", "activation": "softplus"}
    ),
}
MAIN = ("softmax", "differential", "differential_v2", "collinear", "collinear_slack", "collinear_strict")
MAIN += ("differential_collinear", "differential_v2_collinear", "differential_own")
# V1 needs pairs, so two key-value heads of the twin are its multi-query form.
LAYOUTS = {"mha": (8, 8), "gqa": (8, 4), "mqa": (4, 2), "one": (4, 1)}


def make(
    case: Case,
    layout: str,
    dtype: torch.dtype = torch.float64,
    backend: str = "auto",
    spread: float = 0.8,
    **sizes: Any,
) -> Attention:
    heads, kv_heads = LAYOUTS[layout]
    position = {} if "collinear" in case.attention else {"position": case.position}
    torch.manual_seed(5)
    module = CLASSES[case.attention](
        WIDTH,
        heads,
        num_kv_heads=kv_heads,
        head_dim=D,
        layer_idx=case.layer_idx,
        backend=backend,
        **position,
        **case.options,
        **sizes,
    )
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            # Away from the initial values, so that no term hides behind a one or a zero, and with logits that matter.
            scale = 0.3 if "lambda_q" in name or "lambda_k" in name else spread
            parameter.copy_(scale * torch.randn_like(parameter) + (1.0 if "norm" in name else 0.0))
    for part in module.modules():
        if isinstance(part, TrainingProgress):
            part.progress.fill_(case.progress)
    return module.to(dtype)


def spec_of(case: Case, layout: str) -> LayerSpec:
    heads, kv_heads = LAYOUTS[layout]
    # Without a schedule λ has risen; DEX always has one.
    scheduled = case.attention == "dex" or "lambda_warmup" in case.options
    options = {**case.options, "progress": case.progress if scheduled else 1.0}
    return LayerSpec(case.attention, heads, kv_heads, D, case.layer_idx, case.position, options=options)


def weights_digest(module: Attention) -> dict[str, Tensor]:
    """Copies in float64 under the oracle's names, ready for gradients."""
    names = {
        name: name.removeprefix("variant.").removesuffix(".weight") for name, _ in module.named_parameters()
    }
    return {names[n]: p.detach().double().clone().requires_grad_() for n, p in module.named_parameters()}


def run_layer(
    module: Attention, dtype: torch.dtype, call: dict[str, Any], tensors: list[Tensor]
) -> list[Tensor]:
    """Output, then gradients with respect to the input(s) and to every parameter, in float64."""
    inputs = [x.to(dtype).detach().clone().requires_grad_() for x in tensors]
    out = module(*inputs, **call)
    assert out.dtype == dtype
    cotangent = rand(*out.shape, seed=42).to(dtype)
    found = torch.autograd.grad(out, [*inputs, *module.parameters()], cotangent)
    return [x.detach().double() for x in (out, *found)]


def run_oracle(
    case: Case, layout: str, module: Attention, call: dict[str, Any], tensors: list[Tensor]
) -> list[Tensor]:
    inputs = [x.detach().clone().requires_grad_() for x in tensors]
    weights = weights_digest(module)
    out, _ = layer(spec_of(case, layout), weights, *inputs, **call)
    found = torch.autograd.grad(out, [*inputs, *weights.values()], rand(*out.shape, seed=42))
    return [x.detach() for x in (out, *found)]


PADDING = torch.tensor([[False, True, True, True, True], [True, True, True, True, False]])
DOCUMENTS = torch.tensor([[0, 0, 1, 1, 1], [4, 4, 4, 2, 2]])
SEEN = torch.tensor(
    [[1, 0, 1, 0, 1], [0, 1, 1, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]]
).bool()
CONTEXT_PADDING = torch.ones(B, S, dtype=torch.bool).index_fill(1, torch.tensor([2, 6]), False)

# Name -> (has a context, arguments of the layer, arguments of the oracle).
CALLS: dict[str, tuple[bool, dict[str, Any], dict[str, Any]]] = {
    "full": (False, {}, {}),
    "causal": (False, {"is_causal": True}, {"causal": True}),
    "padding": (
        False,
        {"is_causal": True, "key_padding_mask": PADDING},
        {"causal": True, "key_padding": PADDING},
    ),
    "documents": (
        False,
        {
            "is_causal": True,
            "documents": DOCUMENTS,
            "positions": torch.tensor([[0, 1, 0, 1, 2], [0, 1, 2, 0, 1]]),
        },
        {
            "causal": True,
            "documents": DOCUMENTS,
            "positions": torch.tensor([[0, 1, 0, 1, 2], [0, 1, 2, 0, 1]]),
        },
    ),
    "mask": (False, {"attn_mask": SEEN}, {"allowed": SEEN}),
    "positions": (
        False,
        {"is_causal": True, "positions": torch.tensor([[3, 4, 9, 10, 17]])},
        {"causal": True, "positions": torch.tensor([[3, 4, 9, 10, 17]])},
    ),
    "window": (False, {"is_causal": True, "window": 2}, {"causal": True, "window": 2}),
    "window_both_ways": (
        False,
        {"window": 2, "key_padding_mask": PADDING, "documents": DOCUMENTS},
        {"window": 2, "key_padding": PADDING, "documents": DOCUMENTS},
    ),
    "cross": (True, {}, {}),
    "cross_window": (True, {"window": 3}, {"window": 3}),
    "cross_padding": (True, {"key_padding_mask": CONTEXT_PADDING}, {"key_padding": CONTEXT_PADDING}),
    "cross_causal": (
        True,
        {"is_causal": True, "positions": torch.arange(S - L, S)[None]},
        {"causal": True, "positions": torch.arange(S - L, S)[None]},
    ),
}


def compare(name: str, layout: str, call: str, backend: str = "auto") -> None:
    case = CASES[name]
    module = make(case, layout, backend=backend)
    has_context, arguments, oracle_arguments = CALLS[call]
    tensors = [rand(B, L, WIDTH, seed=1)] + ([rand(B, S, WIDTH, seed=2)] if has_context else [])
    expected = run_oracle(case, layout, module, oracle_arguments, tensors)
    found = run_layer(module, torch.float64, arguments, tensors)
    worst = max(distances(found, expected))
    assert worst < 1e-10, f"the layer is {worst:.1e} off its oracle"
