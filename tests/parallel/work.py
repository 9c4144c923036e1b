"""What each of two processes does with saved models, beside what one process does with them; numbers into a file."""

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.distributed.configuration_utils import DistributedConfig

from clearhead.models import ClearheadForCausalLM
from clearhead.registry import VARIANTS
from tests.contracts.grouped_differential import GroupByGroup
from tests.contracts.model_cases import left_padded, make_model, tokens

STEPS = 20
GROUPED = "grouped"
# What is shared out by tensor parallelism: the variant's name here, and what else of the configuration.
SHARED: dict[str, dict[str, Any]] = {
    "softmax": {},
    "softmax normed": {"attention_options": {"head_norm": True}},
    "differential": {},
    "differential alibi": {"position": "alibi"},
    "differential_v2": {},
    "collinear": {},
    "collinear compact": {"compact_cache": True},
    "differential_collinear": {},
    "differential_v2_collinear": {},
    GROUPED: {"attention": GROUPED, "attention_options": {"own_keys": True, "wide": True}},
    "mixed": {"layers": [{"attention": "differential"}, {"sliding_window": 4}]},
}
STAGED = ("differential", "mixed")
TRAINED = ("differential", "differential_v2", "collinear")


def make(case: str) -> ClearheadForCausalLM:
    VARIANTS[GROUPED] = f"{GroupByGroup.__module__}:GroupByGroup"
    name = case.split()[0]
    return make_model("softmax" if name in (GROUPED, "mixed") else name, **SHARED[case])


def save(folder: Path) -> None:
    for case in SHARED:
        make(case).save_pretrained(folder / case)


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def apart(found: Tensor, expected: Tensor) -> float:
    """The largest difference, beside the largest number."""
    return float((found - expected).detach().abs().max() / expected.detach().abs().max().clamp(min=1e-12))


def load(folder: Path, case: str, **sizes: int) -> tuple[ClearheadForCausalLM, ClearheadForCausalLM]:
    """The model of this process's part, and the whole one."""
    VARIANTS[GROUPED] = f"{GroupByGroup.__module__}:GroupByGroup"
    config = DistributedConfig(**sizes)
    part = ClearheadForCausalLM.from_pretrained(folder / case, distributed_config=config)
    return part.eval(), ClearheadForCausalLM.from_pretrained(folder / case).eval()


@torch.no_grad()
def tells(part: ClearheadForCausalLM, model: ClearheadForCausalLM) -> dict[str, Any]:
    """Logits and tokens of a left-padded batch, from both."""
    ids, mask = left_padded([tokens(1, 9)[0], tokens(1, 6, seed=4)[0]])
    given = {"input_ids": ids, "attention_mask": mask}
    real = mask[..., None]
    found = {"logits": apart(part(**given).logits * real, model(**given).logits * real)}
    for kind in ("dynamic", "static"):
        options = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": kind}
        both = [each.generate(**given, **options) for each in (part, model)]
        found[f"tokens {kind}"] = bool(torch.equal(*both))
    return found


def gradients(part: nn.Module, model: nn.Module) -> dict[str, float]:
    """Of two batches, accumulated."""
    for seed in range(2):
        ids = tokens(2, 9, seed=seed)
        for each in (part, model):
            each(input_ids=ids, labels=ids).loss.backward()
    expected = dict(model.named_parameters())
    return {name: apart(whole(p.grad), expected[name].grad) for name, p in part.named_parameters()}


def tensor_parallel(folder: Path, rank: int) -> None:
    """Each model over two ranks by `tp_plan`: logits, tokens, gradients, and its weights saved from there."""
    found: dict[str, Any] = {}
    for case in SHARED:
        part, model = load(folder, case, tp_size=2)
        kept = part.model.layers[0].self_attn.k_proj.weight.to_local().shape[0]
        found[case] = tells(part, model) | {"gradients": gradients(part, model), "rows of keys": kept}
        part.save_pretrained(folder / "again" / case)
    dist.barrier()
    for case in SHARED:
        weights = [load_file(folder / path / case / "model.safetensors") for path in ("", "again")]
        found[case]["saved"] = weights[0].keys() == weights[1].keys() and all(
            torch.equal(value, weights[1][name]) for name, value in weights[0].items()
        )
    write(folder / "tensor parallel", rank, found)


def pipeline(folder: Path, rank: int) -> None:
    """Each model in two stages."""
    found = {}
    for case in STAGED:
        part, model = load(folder, case, pp_size=2)
        found[case] = tells(part, model)
    write(folder / "pipeline", rank, found)


def sharded(folder: Path, rank: int) -> None:
    """FSDP2 by the plan: training with half of each batch in either process, in float32 and loaded in bfloat16."""
    found: dict[str, Any] = {}
    for case in TRAINED:
        part, model = load(folder, case, fsdp_size=2)
        losses = [train(part, rank, 2), train(model, 0, 1)]
        found[case] = {"losses": losses}
        narrow = ClearheadForCausalLM.from_pretrained(
            folder / case, dtype=torch.bfloat16, distributed_config=DistributedConfig(fsdp_size=2)
        )
        kept = {n.rsplit(".", 1)[-1] for n, p in narrow.named_parameters() if p.dtype == torch.float32}
        found[case] |= {"narrow": train(narrow, rank, 2, 3), "kept": sorted(kept)}
    write(folder / "sharded", rank, found)


def train(model: nn.Module, rank: int, ranks: int, steps: int = STEPS) -> list[float]:
    """The mean loss over all ranks' rows at every step."""
    model.train()
    optimiser, found = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for step in range(steps):
        rows = tokens(4, 12, seed=step).chunk(ranks)[rank]
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        mean = loss.detach().clone()
        if ranks > 1:
            dist.all_reduce(mean)
        found.append(float(mean) / ranks)
    return found


def everything(folder: Path, rank: int) -> None:
    """One start of the processes for all of it."""
    tensor_parallel(folder, rank)
    pipeline(folder, rank)
    sharded(folder, rank)


def write(path: Path, rank: int, found: dict[str, Any]) -> None:
    path.with_suffix(f".{rank}.json").write_text(json.dumps(found))
