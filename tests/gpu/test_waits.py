"""The host never waits for a GPU inside a training step, a prompt or a decoded token, on a stand-in that computes."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import StaticCache

from clearhead.core.dispatch import AttentionProblem, load_backend
from clearhead.core.masks import MaskSpec
from clearhead.models import ClearheadForCausalLM
from clearhead.models.tasks import collate, task_of
from clearhead.positions.rope import Rope
from clearhead.train.trainer import ComparisonTrainer
from tests.contracts.model_cases import VARIANTS, left_padded, make_model, tokens
from tests.contracts.support import distance
from tests.gpu.device import bare, gpu, moved_to_cuda, on_cuda, waiting

every_variant = pytest.mark.parametrize("name", VARIANTS)
WINDOWS: dict[str, Any] = {"layers": [{"sliding_window": 4}, {}]}
LIMITS: dict[str, dict[str, Any]] = {
    "windows": WINDOWS,
    "alibi": {"position": "alibi"},
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 8},
}


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    with gpu():
        yield


def there(name: str, **changes: Any) -> ClearheadForCausalLM:
    model = make_model(name, **{"num_hidden_layers": 2 if "layers" in changes else 1, **changes})
    if changes.get("position") == "alibi":
        # FlexAttention, which "auto" would take, compiles its kernel.
        model.set_attn_implementation("eager")
    moved_to_cuda(model)
    return model


def packed(rows: int = 2) -> tuple[Tensor, Tensor]:
    """Positions and document numbers of rows of seven and five tokens."""
    positions = torch.cat((torch.arange(7), torch.arange(5)))[None].repeat(rows, 1)
    return on_cuda(positions), on_cuda((torch.arange(12) >= 7).long()[None].repeat(rows, 1))


# Each of them once, so that a test that sees nothing is known to look.
WAITING: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool((x > 1).any()),
    "int": lambda x: int(x[0]),
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "a slice": lambda x: torch.arange(9)[: x.long().sum()],
    "nonzero": lambda x: x.nonzero(),
    "a mask as an index": lambda x: x[x > 1],
    "unique": lambda x: x.unique(),
    "to the CPU": lambda x: x.cpu(),
    "to the CPU by name": lambda x: x.to("cpu"),
    "from the CPU": lambda x: torch.ones(2).to(x.device),
    "a new tensor": lambda x: torch.tensor([1.0], device=x.device),
    "a number as a tensor": lambda x: torch.as_tensor(1, device=x.device),
    "indices on the CPU": lambda x: x[torch.tensor([0])],
}
FREE: dict[str, Callable[[Tensor], Any]] = {
    "arithmetic": lambda x: (x + 1).exp().sum(),
    "a view": lambda x: x[1:].view(-1)[None],
    "made there": lambda x: torch.arange(3, device=x.device) + torch.full((), 2, device=x.device),
    "another dtype": lambda x: x.to(torch.float64),
    "from the CPU without waiting": lambda x: torch.ones(2).to(x.device, non_blocking=True),
    "its size": lambda x: x.shape[0] + x.numel(),
}


@pytest.mark.parametrize("way", WAITING)
def test_the_stand_in_sees_it(way: str) -> None:
    x = on_cuda(torch.tensor([1.0, 2.0]))
    assert x.device.type == "cuda"
    with waiting() as seen:
        WAITING[way](x)
    assert len(seen) == 1


@pytest.mark.parametrize("way", FREE)
def test_and_nothing_else(way: str) -> None:
    x = on_cuda(torch.tensor([1.0, 2.0]))
    with waiting() as seen:
        FREE[way](x)
    assert seen == []


def test_numbers_of_two_devices_do_not_mix() -> None:
    with pytest.raises(RuntimeError, match="same device, found cuda:0 and cpu"):
        on_cuda(torch.ones(2)) + torch.ones(2)


def ours(seen: list[str]) -> list[str]:
    """Without what Hugging Face's caches wait for: one of fixed size with a window makes a tensor in each update."""
    return [what for what in seen if "cache_utils.py" not in what]


def step(model: ClearheadForCausalLM, optimizer: torch.optim.Optimizer, ids: Tensor, **inputs: Any) -> None:
    model(input_ids=ids, labels=ids, use_cache=False, **inputs).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def check_training(model: ClearheadForCausalLM) -> None:
    ids, (positions, documents) = on_cuda(tokens(2, 12)), packed()
    optimizer = torch.optim.AdamW(model.train().parameters())
    step(model, optimizer, ids)
    with waiting() as seen:
        step(model, optimizer, ids)
        step(model, optimizer, ids, position_ids=positions, seq_idx=documents)
    assert seen == []


@every_variant
def test_training(name: str) -> None:
    check_training(there(name))


@pytest.mark.parametrize("limit", LIMITS)
def test_training_under_limits(limit: str) -> None:
    check_training(there("differential", **LIMITS[limit]))


def test_documents_that_positions_alone_tell_are_looked_for_once() -> None:
    model, (positions, _) = there("differential"), packed()
    with waiting() as seen:
        model(on_cuda(tokens(2, 12)), position_ids=positions, use_cache=False)
    assert len(seen) == 1 and "forward_inputs.py" in seen[0]


@torch.no_grad()
def check_decoding(model: ClearheadForCausalLM) -> None:
    """Three tokens behind a prompt, right and without waiting: with padding and without, in both kinds of cache."""
    ids, mask = left_padded([tokens(1, length, seed=length)[0] for length in (4, 9)])
    more = tokens(2, 3, seed=7)
    moved, options = [on_cuda(x) for x in (ids, mask, more)], {}
    if any(method.depends_on_length for method in model.model.position_methods().values()):
        options["rope_length"] = 12
    for padded in (False, True):
        for fixed in (False, True):
            cache = StaticCache(config=model.config, max_cache_len=12) if fixed else None
            given = {"attention_mask": moved[1]} if padded else {}
            out = model(moved[0], past_key_values=cache, use_cache=True, **given, **options)
            cache, logits = out.past_key_values, [out.logits[:, -1:]]
            with waiting() as seen:
                for at in range(3):
                    if padded:
                        given["attention_mask"] = torch.nn.functional.pad(moved[1], (0, at + 1), value=1)
                    out = model(moved[2][:, at : at + 1], past_key_values=cache, **given, **options)
                    logits.append(out.logits)
            assert ours(seen) == [], (padded, fixed)
            whole = {"attention_mask": torch.nn.functional.pad(moved[1], (0, 3), value=1)} if padded else {}
            expected = model(torch.cat((moved[0], moved[2]), 1), use_cache=False, **whole, **options)
            found = bare(torch.cat(logits, 1))
            assert distance(found, bare(expected.logits[:, -4:])) < 1e-4


@every_variant
def test_decoding(name: str) -> None:
    check_decoding(there(name))


@pytest.mark.parametrize("limit", LIMITS)
def test_decoding_under_limits(limit: str) -> None:
    check_decoding(there("differential", **LIMITS[limit]))


@pytest.mark.parametrize("fixed", [False, True])
@torch.no_grad()
def test_a_prompt(fixed: bool) -> None:
    """One look with a mask, none without; Hugging Face's cache of fixed size begins on the CPU."""
    model, ids = there("differential"), on_cuda(tokens(2, 9))
    mask = torch.ones(2, 9, dtype=torch.long, device="cuda")
    for given, looks in (({}, 0), ({"attention_mask": mask}, 1)):
        cache = StaticCache(config=model.config, max_cache_len=12) if fixed else None
        with waiting() as seen:
            model(ids, past_key_values=cache, **given)
        assert len(ours(seen)) == looks
        assert len(seen) - looks == (model.config.num_hidden_layers if fixed else 0)


@pytest.mark.parametrize("cache", [None, "static"])
def test_each_token_of_generate_waits_once_for_hugging_face(cache: str | None) -> None:
    """It looks after each token whether all rows are finished; the model never does."""
    model, ids = there("differential"), on_cuda(tokens(2, 9))
    counts = []
    for new in (2, 3, 9):
        with waiting() as seen:
            model.generate(
                ids, max_new_tokens=new, do_sample=False, cache_implementation=cache, disable_compile=True
            )
        counts.append(len(seen))
    assert counts[1] - counts[0] == 1 and counts[2] - counts[1] == 6


@pytest.mark.parametrize("fixed", [False, True])
def test_masks_of_flex_are_made_without_waiting(fixed: bool) -> None:
    flex, length = load_backend("flex"), 12
    positions, documents = packed()
    for changes in (
        {"documents": documents},
        {"window": 4},
        {"slopes": torch.ones(4)},
        {"key_padding": documents > 0},
    ):
        offset = torch.full((), 0, device="cuda") if fixed else None
        mask = MaskSpec(is_causal=True, offset=offset, **changes)
        sizes = {"queries": length, "keys": length, "mask": mask, "mixing": "single", "needs_grad": True}
        problem = AttentionProblem.of([4], 2, 1, 8, 8, dtype=torch.bfloat16, device=positions.device, **sizes)
        with waiting() as seen:
            flex.prepare(mask, problem, flex.lowering(problem))
        assert seen == []


@pytest.mark.parametrize("cached", [False, True])
@torch.no_grad()
def test_tables_of_rope_are_made_once_a_pass(cached: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made, original = [], Rope._angles

    def angles(self: Rope, *rest: Any) -> tuple[Tensor, Tensor]:
        made.append(rest)
        return original(self, *rest)

    monkeypatch.setattr(Rope, "_angles", angles)
    model = make_model("differential_v2", num_hidden_layers=5)
    cache = model(tokens(1, 6), use_cache=cached).past_key_values
    assert len(made) == 1
    if cached:
        model(tokens(1, 1), past_key_values=cache)
        assert len(made) == 2


def test_a_batch_of_the_trainer_says_its_documents_on_the_host() -> None:
    whole = {
        "input_ids": np.arange(12),
        "labels": np.arange(12),
        "position_ids": np.arange(12),
        "is_text": True,
    }
    batch = collate([whole, whole])
    assert set(batch) == {"input_ids", "labels", "is_text"}
    positions, documents = (bare(x) for x in packed(1))
    mixed = collate([whole, {**whole, "position_ids": positions[0].numpy()}])
    assert mixed["position_ids"].tolist() == [list(range(12)), positions[0].tolist()]
    assert mixed["seq_idx"].diff(dim=1).tolist() == [[0] * 11, documents[0].diff().tolist()]
    model = make_model("differential")
    alone = model(mixed["input_ids"], position_ids=mixed["position_ids"], use_cache=False).logits
    told = model(
        mixed["input_ids"], position_ids=mixed["position_ids"], seq_idx=mixed["seq_idx"], use_cache=False
    )
    assert torch.equal(alone, told.logits)


def test_the_loss_of_the_trainer() -> None:
    row = {"input_ids": np.arange(3, 15), "labels": np.arange(3, 15), "is_text": True}
    batch = collate([{**row, "position_ids": bare(packed(1)[0])[0].numpy()}] * 2)
    sums = [torch.zeros(2), torch.zeros(2, dtype=torch.float64)]
    trainer: Any = SimpleNamespace(task=task_of("causal"), _loss=on_cuda(sums[0]), _text=on_cuda(sums[1]))
    model = there("differential").train()
    with waiting() as seen:
        for _ in range(2):
            inputs = {name: on_cuda(value) for name, value in batch.items()}
            ComparisonTrainer.compute_loss(trainer, model, inputs).backward()
    assert seen == []
    loss, text = bare(trainer._loss), bare(trainer._text)
    # Eleven labels a row; a row's loss is their mean.
    assert loss[1] == 2 and text[1] == 2 * 2 * 11
    assert abs(float(loss[0] / 2 - text[0] / text[1])) < 1e-6
