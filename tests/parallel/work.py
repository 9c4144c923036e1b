"""What each of two processes does with saved models, beside what one process does with them; numbers into a file."""

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.distributed.configuration_utils import DistributedConfig

from clearhead.models import ClearheadForCausalLM
from clearhead.registry import VARIANTS
from tests.contracts.grouped_differential import GroupByGroup
from tests.contracts.model_cases import left_padded, make_model, tokens

STEPS = 20
GROUPED = "grouped"
# The variant's name here, and what else of the configuration.
CASES: dict[str, dict[str, Any]] = {
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
    "tied": {"tie_word_embeddings": True},
}
# Of each kind of work: what the suite does, and what is left to `make test-peers`.
JOBS = {
    "tensor parallel": ["softmax", "differential", "differential_v2", "collinear"],
    "pipeline": ["mixed"],
    "sharded": ["differential"],
}
MORE = {
    "tensor parallel": [case for case in CASES if case not in JOBS["tensor parallel"]],
    "pipeline": ["softmax", "differential", "differential_v2", "collinear", "tied"],
    "sharded": ["softmax", "differential_v2", "collinear", "differential_collinear", "mixed"],
}


def make(case: str) -> ClearheadForCausalLM:
    VARIANTS[GROUPED] = f"{GroupByGroup.__module__}:GroupByGroup"
    name = case.split()[0]
    return make_model("softmax" if name in (GROUPED, "mixed", "tied") else name, **CASES[case])


def save(folder: Path, jobs: dict[str, list[str]]) -> None:
    for case in {case for cases in jobs.values() for case in cases}:
        make(case).save_pretrained(folder / case)
    write(folder / "jobs.json", jobs)


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def apart(found: Tensor, expected: Tensor) -> float:
    """The largest difference, beside the largest number."""
    return float((found - expected).detach().abs().max() / expected.detach().abs().max().clamp(min=1e-12))


def load(folder: Path, case: str, dtype: torch.dtype, **sizes: int) -> tuple[Any, Any]:
    """The model of this process's part, and the whole one."""
    VARIANTS[GROUPED] = f"{GroupByGroup.__module__}:GroupByGroup"
    config, read = DistributedConfig(**sizes), ClearheadForCausalLM.from_pretrained
    part = read(folder / case, dtype=dtype, distributed_config=config)
    return part.eval(), read(folder / case, dtype=dtype).eval()


@torch.no_grad()
def tells(part: ClearheadForCausalLM, model: ClearheadForCausalLM) -> dict[str, Any]:
    """Logits and tokens of a left-padded batch, from both."""
    ids, mask = left_padded([tokens(1, 9)[0], tokens(1, 6, seed=4)[0]])
    given = {"input_ids": ids, "attention_mask": mask}
    real = mask[..., None]
    found: dict[str, Any] = {"logits": apart(part(**given).logits * real, model(**given).logits * real)}
    expected = model.generate(**given, max_new_tokens=6, do_sample=False)
    for kind in ("dynamic", "static"):
        given |= {"max_new_tokens": 6, "do_sample": False, "cache_implementation": kind}
        found[kind] = bool(torch.equal(part.generate(**given), expected))
    return found


def gradients(part: nn.Module, model: nn.Module) -> dict[str, float]:
    """Of two batches, accumulated."""
    for seed in range(2):
        ids = tokens(2, 9, seed=seed)
        for each in (part, model):
            each(input_ids=ids, labels=ids).loss.backward()
    expected = dict(model.named_parameters())
    return {name: apart(whole(p.grad), expected[name].grad) for name, p in part.named_parameters()}


def tensor_parallel(folder: Path, rank: int, case: str) -> dict[str, Any]:
    """Over two ranks by `tp_plan`: logits, tokens, gradients, and the weights saved from there."""
    part, model = load(folder, case, torch.float64, tp_size=2)
    kept = part.model.layers[0].self_attn.k_proj.weight.to_local().shape[0]
    found = tells(part, model) | {"gradients": gradients(part, model), "rows of keys": kept}
    part.save_pretrained(folder / "again" / case)
    return found


def pipeline(folder: Path, rank: int, case: str) -> dict[str, Any]:
    """In two stages, of a layer each."""
    return tells(*load(folder, case, torch.float64, pp_size=2))


def sharded(folder: Path, rank: int, case: str) -> dict[str, Any]:
    """FSDP2 by the plan: half of each batch in either process; in bfloat16 too where something stays float32."""
    part, model = load(folder, case, torch.float32, fsdp_size=2)
    found: dict[str, Any] = {"losses": train(part, rank, 2)}
    if rank == 0:
        found["alone"] = train(model, 0, 1)
    if any(layer.self_attn.variant.float32_parameters for layer in model.model.layers):
        part, model = load(folder, case, torch.bfloat16, fsdp_size=2)
        kept = {name.rsplit(".", 1)[-1] for name, p in part.named_parameters() if p.dtype == torch.float32}
        found |= {"kept": sorted(kept), "narrow": train(part, rank, 2, 3)}
        found["narrow alone"] = train(model, 0, 1, 3)
    dist.barrier()
    return found


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
    """One start of the processes for all of it: what jobs.json names."""
    work = {"tensor parallel": tensor_parallel, "pipeline": pipeline, "sharded": sharded}
    for job, cases in json.loads((folder / "jobs.json").read_text()).items():
        write(folder / f"{job}.{rank}.json", {case: work[job](folder, rank, case) for case in cases})


def write(path: Path, found: dict[str, Any]) -> None:
    path.write_text(json.dumps(found))
