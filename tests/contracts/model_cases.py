"""Small models of every variant, and the oracle of the same decoder."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from clearhead.models import ClearheadConfig, ClearheadForCausalLM
from clearhead.variants.schedule import advance
from tests.oracles.layers import LayerSpec
from tests.oracles.models import decoder
from tests.oracles.rotary import Turning

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "softmax": ("softmax", {}),
    "differential": ("differential", {}),
    "differential_v2": ("differential_v2", {}),
    "collinear": ("collinear", {"mode": "exact"}),
    "collinear_slack": ("collinear", {"mode": "slack"}),
    "collinear_strict": ("collinear", {"mode": "strict", "activation": "softplus"}),
    "differential_collinear": ("differential_collinear", {"mode": "exact"}),
    "differential_collinear_slack": ("differential_collinear", {"mode": "slack", "lambda_init": 0.5}),
    "differential_v2_collinear": ("differential_v2_collinear", {"mode": "exact"}),
    "dex": ("dex", {"heads": [0, 2], "weight_std": 0.3, "anneal": 8}),
    "diff_lora": ("diff_lora", {"rank": 3, "alpha": 6.0, "lambda_warmup": 8}),
}
# Heads and key-value heads of the twin; V1 pairs them, so its multi-query form has two.
LAYOUTS = {"mha": (4, 4), "gqa": (8, 4), "mqa": (4, 1)}
VOCABULARY, WIDTH, HEAD, LAYERS = 41, 24, 4, 2


def layout_of(name: str, layout: str) -> tuple[int, int]:
    heads, kv_heads = LAYOUTS[layout]
    pairs = VARIANTS[name][0] in ("differential", "differential_collinear")
    return heads, max(kv_heads, 2) if pairs else kv_heads


def make_config(name: str, layout: str = "gqa", **changes: Any) -> ClearheadConfig:
    return ClearheadConfig(**settings_of(name, layout) | changes)


def settings_of(name: str, layout: str) -> dict[str, Any]:
    """The keys of a small configuration, of a decoder or an encoder."""
    attention, options = VARIANTS[name]
    heads, kv_heads = layout_of(name, layout)
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": HEAD,
        "attention": attention,
        "attention_options": options,
        # Wide enough that tokens, not rounding, decide the logits.
        "initializer_range": 0.25,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
    }


def make_model(
    name: str, layout: str = "gqa", dtype: torch.dtype = torch.float32, **changes: Any
) -> ClearheadForCausalLM:
    torch.manual_seed(11)
    model = ClearheadForCausalLM(make_config(name, layout, **changes)).to(dtype).eval()
    shake(model)
    return model


def shake(model: nn.Module) -> None:
    """Move what starts at a special value: schedules, norms and λ."""
    advance(model, 3)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif "lambda_" in key and "proj" not in key:
                parameter.add_(0.2 * torch.randn_like(parameter))


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    """Token ids without the special ones."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows of different length as one batch padded on the left, and its attention mask."""
    longest = max(len(row) for row in rows)
    ids = torch.stack([torch.cat((row.new_zeros(longest - len(row)), row)) for row in rows])
    mask = torch.stack([torch.arange(longest) >= longest - len(row) for row in rows]).long()
    return ids, mask


def oracle_of(
    name: str,
    layout: str,
    model: ClearheadForCausalLM,
    ids: Tensor,
    *,
    base: float | Turning = 10_000.0,
    **arguments: Any,
) -> Any:
    """Logits and effective maps of the oracle with this model's weights."""
    state = {key: value.double() for key, value in model.state_dict().items()}
    blocks = blocks_of(state, model.config.num_hidden_layers)
    spec = spec_of(name, layout, state, base)
    embedding, norm, head = (
        state[key] for key in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
    )
    return decoder(spec, embedding, blocks, norm, head, ids, **arguments)


def spec_of(name: str, layout: str, state: dict[str, Tensor], base: float | Turning = 10_000.0) -> LayerSpec:
    """What the oracle's layers are, for a model with these tensors."""
    attention, options = VARIANTS[name]
    heads, kv_heads = layout_of(name, layout)
    shares = {float(value) for key, value in state.items() if key.endswith("progress")} or {1.0}
    (progress,) = shares
    told = {**options, "progress": progress}
    return LayerSpec(attention, heads, kv_heads, HEAD, base=base, options=told)


def blocks_of(state: dict[str, Tensor], layers: int, stack: str = "model") -> list[dict[str, Tensor]]:
    """The layers' weights under the oracle's names."""
    blocks = []
    for index in range(layers):
        prefix = f"{stack}.layers.{index}."
        block = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        attention_part = {
            key.removeprefix("self_attn.").removeprefix("variant.").removesuffix(".weight"): value
            for key, value in block.items()
            if key.startswith("self_attn.")
        }
        rest = {
            "mlp_norm": block["post_attention_layernorm.weight"],
            "gate": block["mlp.gate_proj.weight"],
            "up": block["mlp.up_proj.weight"],
            "down": block["mlp.down_proj.weight"],
        }
        if "input_layernorm.weight" in block:
            rest["attention_norm"] = block["input_layernorm.weight"]
        blocks.append(attention_part | rest)
    return blocks


@torch.no_grad()
def float32_rounding(wide: ClearheadForCausalLM, ids: Tensor, draws: int = 4) -> Tensor:
    """How far the logits of `ids` move when every weight of the float64 model `wide` does by a rounding of float32.

    The largest of a few draws, element by element: how well conditioned a row is, on every processor alike. What
    float32 arithmetic itself loses on a row is luck, a tenth to all of it.
    """
    exact = wide(ids).logits
    worst = torch.zeros_like(exact)
    for draw in range(draws):
        moved, rng = copy.deepcopy(wide), torch.Generator().manual_seed(draw)
        for weight in moved.parameters():
            noise = torch.randn(weight.shape, generator=rng, dtype=torch.float64)
            weight.mul_(1 + torch.finfo(torch.float32).eps * noise)
        worst = torch.maximum(worst, (moved(ids).logits - exact).abs())
    return worst
