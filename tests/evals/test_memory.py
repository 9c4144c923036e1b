"""Quality against bytes on tiny models: what a cell reads, what it counts, and its report."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from clearhead.evals.asking.losses import suffix_losses
from clearhead.evals.internals.memory.evaluation import Memory, MemoryConfig
from clearhead.evals.internals.memory.section import smallest
from tests.evals import tiny
from tests.evals.test_activation_outliers import run_of

SMALL = MemoryConfig(length=200, documents=5, samples=3, needles=[1, 2], budgets=[0.5], batch_tokens=600)


def model_of(attention: str) -> Any:
    torch.manual_seed(0)
    # Heads as wide as a group of a value's channels; positions for all of a text.
    return tiny.ours(attention=attention, hidden_size=128, num_attention_heads=2, num_key_value_heads=2)


@pytest.fixture(scope="module", params=["softmax", "differential"])
def measured(request: pytest.FixtureRequest) -> tuple[Any, dict[str, Any], str]:
    model, store = model_of(request.param), tiny.store([210] * 6)
    subject = tiny.subject(model, store)
    return subject, Memory().run(subject, SMALL), request.param


def test_the_whole_cache_is_no_cache(measured: Any) -> None:
    subject, values, _ = measured
    assert values["prompt"] == 150 and values["n"] == 5
    rows = np.array([[1, *subject.documents.document(int(i)).tolist()[:199]] for i in values["documents"]])
    with torch.no_grad():
        expected = suffix_losses(subject.model.eval(), torch.from_numpy(rows), 150).double().sum(1)
    whole = values["cells"][0]
    assert whole["form"] == "whole" and whole["bytes"] == 1
    np.testing.assert_allclose(whole["nats"], expected, atol=2e-3)


def test_bytes_are_those_of_the_caches(measured: Any) -> None:
    subject, values, attention = measured
    cells = {cell["form"]: cell for cell in values["cells"]}
    sizes = subject.model.model.layers[0].self_attn.variant.sizes
    keys, value = sizes.key_streams * sizes.key_width, sizes.value_width
    groups = math.ceil(value / 64)
    for bits, held in ((8, 8), (4, 4), (3, 4)):
        codes = 128 * (keys + value) * held / 8 + keys * 4 + 128 * groups * 4
        share = (codes + 21 * 2 * (keys + value)) / (149 * 2 * (keys + value))
        assert cells[f"{bits} bits"]["bytes"] == pytest.approx(share, abs=1e-5)
    assert cells["knorm, 0.5 of the tokens"]["bytes"] == pytest.approx(75 / 149, abs=1e-5)
    ranked = [name for name in cells if "by signal" in name]
    assert len(ranked) == (3 if attention == "differential" else 0)
    assert not values["skipped_cells"]


def test_less_is_lost_with_more_bits_and_all_answers_are_counted(measured: Any) -> None:
    _, values, _ = measured
    cells = {cell["form"]: cell for cell in values["cells"]}
    whole = np.array(cells["whole"]["nats"])
    lost = [np.abs(np.array(cells[f"{bits} bits"]["nats"]) - whole).mean() for bits in (8, 4, 3)]
    assert 0 < lost[0] < lost[1] < lost[2]
    for cell in values["cells"]:
        assert {kind: len(said) for kind, said in cell["correct"].items()} == {"1": 3, "2": 3}


def test_its_report(measured: Any) -> None:
    _, values, _ = measured
    section = Memory().section(run_of({"a": values, "b": values}, "memory"))
    assert "held as 3 bits" in section.answer and "No difference from a detected" in section.answer
    table = section.tables[0]
    assert table.rows[0][:2] == ["a, whole", "100.0"] and len(table.rows) == 2 * len(values["cells"])
    slugs = {chart.slug for chart in section.charts}
    assert {"memory-fewer-bits-loss", "memory-snapkv-needles-2", "memory-random-loss"} <= slugs
    assert "no results" not in section.answer.lower()


def test_what_cannot_be_measured_is_named() -> None:
    store = tiny.store([210] * 6)
    values = Memory().run(tiny.subject(tiny.llama(), store), SMALL.model_copy(update={"samples": 0}))
    reasons = values["skipped_cells"]
    assert "needs queries" in reasons["snapkv, 0.5 of the tokens"] and "8 bits" not in reasons
    assert smallest(Memory.Result.model_validate(values)) == "3 bits"
    short = SMALL.model_copy(update={"length": 100, "samples": 0})
    values = Memory().run(tiny.subject(model_of("softmax"), store), short)
    assert "blocks of 128 tokens" in values["skipped_cells"]["8 bits"]
    assert smallest(Memory.Result.model_validate(values)).endswith("0.5 of the tokens")
    nothing = SMALL.model_copy(update={"bits": [], "policies": []})
    assert "no cache is smaller" in Memory().run(tiny.subject(model_of("softmax"), store), nothing)["skipped"]
    late = SMALL.model_copy(update={"prompt": 200})
    assert "leaves nothing of 200" in Memory().run(tiny.subject(model_of("softmax"), store), late)["skipped"]
