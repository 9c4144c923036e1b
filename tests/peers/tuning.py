"""TRL's and PEFT's trainers and adapters on saved models, full and with adapters. Part of `make test-peers`."""

import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from clearhead.models import ClearheadForCausalLM
from tests.contracts.model_cases import make_model, tokens
from tests.contracts.support import distance
from tests.evals import tiny

NAMES = ("softmax", "differential", "differential_v2", "collinear")
PAIRS = [
    {"prompt": f"The {thing} is", "completion": f" {colour}.", "rejected": f" {other}."}
    for thing, colour, other in [
        ("grass", "green", "blue"),
        ("sky", "blue", "green"),
        ("key", "hidden", "green"),
    ]
    * 4
]
PLAIN: dict[str, Any] = {
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "max_steps": 4,
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "bf16": False,
    "disable_tqdm": True,
    "gradient_checkpointing": False,
}
every_model = pytest.mark.parametrize("name", NAMES)


def saved(folder: Path, name: str) -> Path:
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 128}
    return tiny.save(folder / "model", tiny.ours(attention=name, **special))


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def adapter(full: bool) -> Any:
    return None if full else peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM")


@pytest.mark.parametrize("full", [True, False], ids=["full", "lora"])
@every_model
def test_supervised_fine_tuning_of_packed_rows_on_completions_only(
    name: str, full: bool, tmp_path: Path
) -> None:
    """By the path alone. What a packed batch costs is what its texts cost one by one."""
    folder = saved(tmp_path, name)
    config = SFTConfig(
        output_dir=str(tmp_path / "out"), packing=True, max_length=48, completion_only_loss=True, **PLAIN
    )
    data = Dataset.from_list([{key: pair[key] for key in ("prompt", "completion")} for pair in PAIRS])
    trainer = SFTTrainer(model=str(folder), args=config, train_dataset=data, peft_config=adapter(full))
    batch = next(iter(trainer.get_train_dataloader()))
    ids, labels, places = (batch[key].flatten() for key in ("input_ids", "labels", "position_ids"))
    starts = (places == 0).nonzero().flatten().tolist()
    assert len(starts) > len(batch["input_ids"])
    model = ClearheadForCausalLM.from_pretrained(folder)
    spent, count = 0.0, 0
    for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
        logits = model(ids[None, start:end]).logits[0, :-1]
        wanted = labels[start + 1 : end]
        spent += float(cross_entropy(logits, wanted, reduction="sum"))
        count += int((wanted != -100).sum())
    assert 0 < count < len(ids) - len(starts)
    with torch.no_grad():
        packed = trainer.model(**{key: value for key, value in batch.items() if key != "seq_lengths"}).loss
    assert float(packed) == pytest.approx(spent / count, rel=1e-4)
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    trainer.train()
    found = losses(trainer)
    assert found[-1] < found[0]
    changed = {
        key for key, value in trainer.model.state_dict().items() if not torch.equal(value, before[key])
    }
    assert changed and all("lora_" in key for key in changed) is not full


@pytest.mark.parametrize("full", [True, False], ids=["full", "lora"])
@every_model
def test_preferences(name: str, full: bool, tmp_path: Path) -> None:
    folder = saved(tmp_path, name)
    config = DPOConfig(output_dir=str(tmp_path / "out"), **PLAIN)
    rows = [{"prompt": p["prompt"], "chosen": p["completion"], "rejected": p["rejected"]} for p in PAIRS]
    trainer = DPOTrainer(
        model=str(folder),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=adapter(full),
    )
    trainer.train()
    found = losses(trainer)
    # Model and reference are one at the start.
    assert found[0] == pytest.approx(math.log(2), rel=1e-3) and found[-1] < found[0]


ADAPTERS = {
    "LoRA": lambda: peft.LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False),
    "DoRA": lambda: peft.LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False, use_dora=True),
    "IA3": lambda: peft.IA3Config(task_type="CAUSAL_LM", init_ia3_weights=False),
}


@pytest.mark.parametrize("kind", ADAPTERS)
@every_model
@torch.no_grad()
def test_adapters_are_merged_and_read_again(name: str, kind: str, tmp_path: Path) -> None:
    plain, ids = make_model(name, dtype=torch.float64), tokens(2, 9)
    before = plain(ids).logits
    plain.save_pretrained(tmp_path / "base")
    torch.manual_seed(3)
    tuned = peft.get_peft_model(plain, ADAPTERS[kind]()).eval().double()
    expected = tuned(input_ids=ids).logits
    assert distance(expected, before) > 1e-3
    tuned.save_pretrained(tmp_path / "adapter")
    base = ClearheadForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float64)
    again = (
        peft.PeftModel.from_pretrained(base, tmp_path / "adapter", autocast_adapter_dtype=False)
        .eval()
        .double()
    )
    # The adapter's file holds float64.
    assert distance(again(input_ids=ids).logits, expected) < 1e-10
    merged = tuned.merge_and_unload()
    assert type(merged) is ClearheadForCausalLM
    assert distance(merged(input_ids=ids).logits, expected) < 1e-10
    merged.save_pretrained(tmp_path / "merged")
    read = ClearheadForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float64)
    assert distance(read(ids).logits, expected) < 1e-10
