"""The models whose training steps are timed: every variant on every backend, and DiffLlama of transformers."""

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DiffLlamaConfig, DiffLlamaForCausalLM, PreTrainedModel

from clearhead.bench.cases import TrainCase, attention_flops
from clearhead.bench.gate import GateVerdict, Results, flat, judge
from clearhead.bench.measure import reason_of
from clearhead.bench.peers import Unavailable, dtype_of, refusal
from clearhead.core.dispatch import AttentionProblem
from clearhead.core.masks import MaskSpec
from clearhead.core.streams import Widths
from clearhead.models import ClearheadConfig, ClearheadForCausalLM

# Tokens of a row when a model is checked against float64.
GATE_CONTEXT = 96
# And its layers on a GPU, where models are large.
GATE_LAYERS = 2


@dataclass(frozen=True, slots=True)
class BenchArm:
    """An attention and what runs it."""

    attention: str
    backend: str
    options: Mapping[str, Any] = field(default_factory=dict)
    diff_llama: bool = False


def _arms() -> dict[str, BenchArm]:
    variants: dict[str, tuple[str, dict[str, Any]]] = {
        "Transformer": ("softmax", {}),
        "DIFF V1": ("differential", {}),
        "DIFF V2": ("differential_v2", {}),
        "CoCA exact": ("collinear", {"mode": "exact"}),
        "CoCA slack": ("collinear", {"mode": "slack"}),
    }
    arms = {
        f"{name} ({backend})": BenchArm(attention, backend, options)
        for name, (attention, options) in variants.items()
        for backend in ("cpu", "triton", "sdpa", "flex", "eager")
    }
    return {**arms, "DiffLlama (sdpa)": BenchArm("differential", "sdpa", diff_llama=True)}


ARMS = _arms()


def build(arm: BenchArm, case: TrainCase) -> PreTrainedModel:
    """The arm's model, its weights always the same; `Unavailable` with the reason if its backend cannot run it."""
    config = _config(arm, case)
    reason = _refusal(arm, config, case)
    if reason is not None:
        raise Unavailable(reason)
    torch.manual_seed(0)
    model: PreTrainedModel
    # Made where it is used: a large model's numbers are drawn in seconds there.
    with torch.device(case.device):
        if arm.diff_llama:
            sizes = {**_sizes(case), "intermediate_size": config.intermediate_size}
            model = DiffLlamaForCausalLM(DiffLlamaConfig(**sizes))
        else:
            model = ClearheadForCausalLM(config)
    model.set_attn_implementation(arm.backend)
    # Some of DiffLlama's parameters are drawn by a function that does not know of the device around it.
    nn.Module.to(model, case.device)
    return model.train()


def timed_step(model: PreTrainedModel, case: TrainCase) -> Callable[[], object]:
    """One step of AdamW on random tokens."""
    ids = _tokens(case)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with _precision(case):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def step_flops(arm: BenchArm, model: PreTrainedModel, case: TrainCase) -> float:
    """Six for every weight of a matrix product and token, and what attention needs in every layer."""
    weights = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    sizes = _widths(_config(arm, case))
    pairs = case.batch * case.context**2 / 2
    attention = attention_flops(
        pairs, sizes.heads, sizes.query_streams, sizes.key_width, sizes.value_width, backward=True
    )
    return 6.0 * weights * case.batch * case.context + case.layers * attention


def check(arm: BenchArm, case: TrainCase) -> list[GateVerdict]:
    """Verdicts on logits and gradients at a short context, against the same weights, eager, in float64."""
    layers = case.layers if case.device == "cpu" else min(case.layers, GATE_LAYERS)
    reduced = replace(case, context=min(GATE_CONTEXT, case.context), layers=layers)
    model = build(arm, reduced)
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("eager")
    exact = copy.deepcopy(plain).double()
    try:
        found = _results(model, reduced)
    except Exception as error:  # whatever a peer raises is its answer
        return [GateVerdict("it raised", None, note=reason_of(error))]
    right = _results(exact, replace(reduced, dtype="float32"))
    return judge(found, right, _results(plain, reduced), dtype_of(case))


def _results(model: PreTrainedModel, case: TrainCase) -> Results:
    ids = _tokens(case)
    with _precision(case):
        output = model(input_ids=ids, labels=ids, use_cache=False)
    gradients = torch.autograd.grad(output.loss, list(model.parameters()))
    return {"logits": output.logits.detach(), "gradients": flat(gradients)}


def _tokens(case: TrainCase) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    return torch.randint(0, case.vocabulary, (case.batch, case.context), generator=rng).to(case.device)


def _precision(case: TrainCase) -> AbstractContextManager[Any]:
    """Autocast in a case of 16 bits: weights, their gradients and moments stay in float32, as in training."""
    return nullcontext() if case.dtype == "float32" else torch.autocast(case.device, dtype_of(case))


def _sizes(case: TrainCase) -> dict[str, Any]:
    return {
        "vocab_size": case.vocabulary,
        "hidden_size": case.width,
        "num_hidden_layers": case.layers,
        "num_attention_heads": case.heads,
        "max_position_embeddings": case.context,
    }


def _config(arm: BenchArm, case: TrainCase) -> ClearheadConfig:
    return ClearheadConfig(**_sizes(case), attention=arm.attention, attention_options=dict(arm.options))


def _widths(config: ClearheadConfig) -> Widths:
    return config.make_variant(0).sizes


def _refusal(arm: BenchArm, config: ClearheadConfig, case: TrainCase) -> str | None:
    variant = config.make_variant(0)
    found = AttentionProblem.of_widths(
        variant.sizes,
        queries=case.context,
        keys=case.context,
        mask=MaskSpec(is_causal=True),
        mixing=variant.mixing,
        dtype=dtype_of(case),
        device=torch.device(case.device),
        needs_grad=True,
    )
    return refusal(arm.backend, found)
