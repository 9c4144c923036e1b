"""The models and caches whose greedy text is timed, and what they are held to before that.

Legend: B batch, L tokens of the prompt, V vocabulary.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    Cache,
    DiffLlamaConfig,
    DiffLlamaForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    StaticCache,
)

from clearhead.bench.cases import GenerateCase
from clearhead.bench.gate import GateVerdict, judge
from clearhead.bench.measure import reason_of
from clearhead.bench.peers import dtype_of
from clearhead.models import (
    ClearheadConfig,
    ClearheadForCausalLM,
    EvictingCache,
    GrowingCache,
    QuantisedCache,
)

Form = Literal["dynamic", "growing", "static", "int8", "int4", "evicting"]
# The model chooses its backend by itself, as it does for a user who says nothing.
AUTOMATIC = "clearhead"
BITS: dict[Form, int] = {"int8": 8, "int4": 4}
POLICY, BUDGET = "snapkv", 0.25
# The gate's prompt has two blocks of codes behind it; so many tokens are read one by one after it.
GATE_CONTEXT, GATE_STEPS, GATE_LAYERS = 320, 3, 2
# The kernel rounds what it multiplies codes with; its tests hold it to this part of what the codes themselves change.
CODES_SHARE = 1 / 8


@dataclass(frozen=True, slots=True)
class GenerateArm:
    """A model, what runs its attention, and the cache that it writes behind.

    cache: "dynamic" is Hugging Face's own, which copies all it holds for a token; "growing" what our models make.
    family: "clearhead" with `attention`, or transformers' own "llama" or "diffllama".
    """

    attention: str = "softmax"
    options: Mapping[str, Any] = field(default_factory=dict)
    backend: str = AUTOMATIC
    cache: Form = "dynamic"
    compact: bool = False
    family: Literal["clearhead", "llama", "diffllama"] = "clearhead"

    @property
    def model(self) -> tuple[str, ...]:
        """Arms that are equal in this have one model."""
        return self.family, self.attention, str(dict(self.options)), str(self.compact), self.backend


ARMS: dict[str, GenerateArm] = {
    "Transformer (sdpa)": GenerateArm(backend="sdpa"),
    "Transformer (sdpa), growing": GenerateArm(backend="sdpa", cache="growing"),
    "Transformer (sdpa), static": GenerateArm(backend="sdpa", cache="static"),
    "LLaMA of transformers (sdpa)": GenerateArm(backend="sdpa", family="llama"),
    "DiffLlama of transformers (sdpa)": GenerateArm(backend="sdpa", family="diffllama"),
    "Transformer": GenerateArm(cache="growing"),
    "Transformer, int8": GenerateArm(cache="int8"),
    "DIFF V1": GenerateArm("differential", cache="growing"),
    "DIFF V1, copied": GenerateArm("differential"),
    "DIFF V1, static": GenerateArm("differential", cache="static"),
    "DIFF V1, int8": GenerateArm("differential", cache="int8"),
    "DIFF V1, int4": GenerateArm("differential", cache="int4"),
    "DIFF V1, a quarter of the prompt": GenerateArm("differential", cache="evicting"),
    "DIFF V2": GenerateArm("differential_v2", cache="growing"),
    "CoCA exact": GenerateArm("collinear", {"mode": "exact"}, cache="growing"),
    "CoCA exact, compact": GenerateArm("collinear", {"mode": "exact"}, cache="growing", compact=True),
}


def build(arm: GenerateArm, case: GenerateCase) -> PreTrainedModel:
    """The arm's model, its weights always the same, in the case's dtype."""
    sizes: dict[str, Any] = {
        "vocab_size": case.vocabulary,
        "hidden_size": case.width,
        "num_hidden_layers": case.layers,
        "num_attention_heads": case.heads,
        "num_key_value_heads": case.groups,
        "max_position_embeddings": 2 * case.context,
    }
    config = ClearheadConfig(
        **sizes,
        attention=arm.attention,
        attention_options=dict(arm.options),
        compact_cache=arm.compact,
    )
    torch.manual_seed(0)
    model: PreTrainedModel
    if arm.family == "clearhead":
        model = ClearheadForCausalLM(config)
    else:
        sizes["intermediate_size"] = config.intermediate_size
        model = (
            LlamaForCausalLM(LlamaConfig(**sizes))
            if arm.family == "llama"
            else DiffLlamaForCausalLM(DiffLlamaConfig(**sizes))
        )
    nn.Module.to(model, dtype_of(case))
    return model.eval()


def prompt_of(case: GenerateCase) -> Tensor:
    """(B, L) random tokens."""
    rng = torch.Generator().manual_seed(0)
    return torch.randint(0, case.vocabulary, (case.batch, case.context), generator=rng)


def new_cache(arm: GenerateArm, model: PreTrainedModel, tokens: int) -> Cache:
    """An empty cache of the arm's form. tokens: how many a cache of fixed size has room for."""
    if arm.cache == "static":
        return StaticCache(config=model.config, max_cache_len=tokens)
    if arm.cache == "evicting":
        return EvictingCache(model.config, POLICY, BUDGET)
    if arm.cache == "growing":
        return GrowingCache(model.config)
    if arm.cache in BITS:
        return QuantisedCache(model.config, BITS[arm.cache])
    return DynamicCache(config=model.config)


def cache_bytes(cache: Cache) -> int:
    """Bytes of all that a cache holds, those of a fixed one whether they are used or not."""
    own = getattr(cache, "nbytes", None)
    if own is not None:
        return int(own)
    found = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
    return sum(x.nbytes for x in found if isinstance(x, Tensor))


def forward(model: PreTrainedModel, cache: Cache, tokens: Tensor) -> Tensor:
    """(B, V): logits of the last of `tokens`, which the cache takes up."""
    with torch.no_grad():
        out = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
    logits: Tensor = out.logits[:, -1]
    return logits


def check(arm: GenerateArm, case: GenerateCase) -> list[GateVerdict]:
    """Verdicts on the logits of tokens read one by one behind a short prompt.

    A whole cache is held to the same weights on the eager engine in float64. A smaller one changes the logits by what
    it is: it is held to the same smaller cache read by plain PyTorch in float64, what the kernel rounds in codes aside.
    """
    reduced = replace(
        case, context=GATE_CONTEXT, batch=min(case.batch, 2), layers=min(case.layers, GATE_LAYERS)
    )
    model = build(arm, reduced)
    exact = copy.deepcopy(model).double()
    plain = copy.deepcopy(model)
    ids = torch.cat((prompt_of(reduced), prompt_of(reduced)[:, :GATE_STEPS]), 1)
    try:
        found = _logits(arm, model, arm.backend, arm.backend, ids)
    except Exception as error:  # whatever a peer raises is its answer
        return [GateVerdict("it raised", None, note=reason_of(error))]
    later = "blocks" if arm.cache in BITS else "eager"
    right = _logits(_unfixed(arm), exact, "eager", later, ids)
    same = _logits(_unfixed(arm), plain, "eager", later, ids)
    (verdict,) = judge({"logits": found}, {"logits": right}, {"logits": same}, dtype_of(case))
    if arm.cache in BITS:
        whole = _logits(replace(arm, cache="dynamic"), exact, "eager", "eager", ids)
        cost = float((right - whole).norm() / right.norm())
        verdict = replace(verdict, bar=verdict.bar + CODES_SHARE * cost)
    return [verdict]


def _unfixed(arm: GenerateArm) -> GenerateArm:
    """Eager attention grows its cache: a fixed one holds the same."""
    return replace(arm, cache="dynamic") if arm.cache == "static" else arm


def _logits(arm: GenerateArm, model: PreTrainedModel, prompt: str, later: str, ids: Tensor) -> Tensor:
    """(B, GATE_STEPS + 1, V): of the prompt's last token by one backend, and of those behind it by another."""
    model.set_attn_implementation(prompt)
    cache = new_cache(arm, model, ids.shape[1])
    found = [forward(model, cache, ids[:, :GATE_CONTEXT])]
    model.set_attn_implementation(later)
    found += [forward(model, cache, ids[:, i : i + 1]) for i in range(GATE_CONTEXT, ids.shape[1])]
    return torch.stack(found, 1)
