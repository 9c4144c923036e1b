"""Free text and what was kept of an original: rules by hand, a loop, sampling, and known divergences."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from clearhead.data.prepare import PreparedData
from clearhead.evals.evaluation import ArmResults, RunResults, SeedResults
from clearhead.evals.subject import Subject
from clearhead.evals.text.generations import (
    Generations,
    GenerationsConfig,
    GenerationsResult,
    loops,
    repetition,
    until,
)
from clearhead.evals.text.kept import Kept, KeptConfig
from clearhead.models import ClearheadConfig, ClearheadForCausalLM


def model_of(data: PreparedData, **settings: Any) -> ClearheadForCausalLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    return ClearheadForCausalLM(
        ClearheadConfig(vocab_size=len(data.tokenizer), **{**sizes, **settings})
    ).eval()


def subject_of(model: ClearheadForCausalLM, data: PreparedData) -> Subject:
    return Subject(
        model=model,
        tokenizer=data.tokenizer,
        open_documents=lambda: data.validation,
        device=torch.device("cpu"),
        untrained=lambda: model,
        seed=3,
        training_length=32,
    )


def run_of(name: str, values: dict[str, dict[str, Any]]) -> RunResults:
    arms = [
        ArmResults(arm, arm, "softmax", {0: SeedResults([], results={name: {"values": one}} if one else {})})
        for arm, one in values.items()
    ]
    return RunResults({"name": "run"}, {}, arms)


def test_rules_by_hand() -> None:
    # Runs of two that were there before: (1, 2) and (2, 3) once more, each.
    assert repetition([1, 2, 3], [1, 2, 3, 9], 2) == 2 / 4
    assert repetition([], [5, 5, 5, 5], 2) == 2 / 4
    assert repetition([1, 2, 3, 4], [], 4) == 0.0
    assert repetition([1, 2, 3, 4, 5], [1, 2, 3, 4, 5], 4) == 2 / 5
    assert until([4, 7, 1, 9], [1, 2]) == ([4, 7], True)
    assert until([4, 7], [1]) == ([4, 7], False)
    assert loops([9] * 5 + [1, 2, 3] * 11)
    assert not loops(list(range(40))) and not loops([1, 2] * 10)


def test_a_model_that_says_one_word_loops(data: PreparedData) -> None:
    model = model_of(data)
    with torch.no_grad():
        # The final norm's output is its weight's sign here, whatever the input: one token wins everywhere.
        model.lm_head.weight.zero_()
        model.lm_head.weight[77] = 0.0
        model.model.embed_tokens.weight.fill_(1.0)
        model.lm_head.weight[77] = 1.0
    config = GenerationsConfig(modes=["greedy"], prompts=3, prompt_tokens=8, new_tokens=40)
    values = GenerationsResult.model_validate(Generations().run(subject_of(model, data), config))
    (greedy,) = values.values_by_mode
    assert greedy.loops == [True] * 3 and greedy.tokens == [40] * 3 and greedy.ended == [False] * 3
    assert all(share >= 36 / 40 for share in greedy.repetition)


def test_sampling_is_of_its_own_seed_and_ends_where_the_model_says(data: PreparedData) -> None:
    model = model_of(data, eos_token_id=data.tokenizer.eos_token_id)
    config = GenerationsConfig(prompts=4, prompt_tokens=8, new_tokens=64, batch=3)
    torch.manual_seed(5)
    first = Generations().run(subject_of(model, data), config)
    torch.manual_seed(6)
    state = torch.get_rng_state()
    again = Generations().run(subject_of(model, data), config)
    assert first == again and torch.equal(state, torch.get_rng_state())
    greedy, sampled = GenerationsResult.model_validate(first).values_by_mode
    assert (greedy.mode, sampled.mode) == ("greedy", "sampled")
    # A random model draws almost evenly from 512 tokens: nothing of four comes back.
    assert max(sampled.repetition) < 0.05
    assert all(ended == (length < 64) for ended, length in zip(sampled.ended, sampled.tokens, strict=True))
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(1.0)
        model.lm_head.weight.zero_()
        model.lm_head.weight[data.tokenizer.eos_token_id] = 1.0
    ended = GenerationsResult.model_validate(
        Generations().run(subject_of(model, data), config)
    ).values_by_mode[0]
    assert ended.tokens == [0] * 4 and ended.ended == [True] * 4 and ended.repetition == [0.0] * 4


def test_sections_say_who_repeats_less_and_who_is_nearer(data: PreparedData) -> None:
    def texts(share: float) -> dict[str, Any]:
        value = {"mode": "greedy", "repetition": [share] * 3, "tokens": [5] * 3}
        value |= {"ended": [True, False, False], "loops": [False] * 3}
        return {"values_by_mode": [value], "new_tokens": 40, "gram": 4}

    section = Generations().section(run_of("generations", {"a": texts(0.5), "b": texts(0.25)}))
    rows = section.tables[0].rows
    assert rows == [["a", "greedy", "0.500", "0%", "5", "33%"], ["b", "greedy", "0.250", "0%", "5", "33%"]]
    kept = {"length": 32, "divergence": [0.25] * 3, "agreement": [0.5] * 3, "loss_difference": [-0.125] * 3}
    found = Kept().section(run_of("kept", {"a": kept}))
    assert found.tables[0].rows == [["a", "0.2500", "50.0%", "-0.1250"]]
    for evaluation in (Generations(), Kept()):
        assert evaluation.section(run_of("other", {"a": {}})).missing


def test_kept_by_known_distributions(data: PreparedData, tmp_path: Path) -> None:
    """Logits that do not look at the input: the original is even, the model gives one token half of everything."""
    original = model_of(data)
    with torch.no_grad():
        original.lm_head.weight.zero_()
    original.save_pretrained(tmp_path / "seed-3")
    model = model_of(data)
    tokens = len(data.tokenizer)
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(1.0)
        for part in (model.model.layers[0].self_attn.o_proj, model.model.layers[0].mlp.down_proj):
            part.weight.zero_()
        # The state is 1 in every component, 16 of them (but for the norm's eps).
        model.lm_head.weight.zero_()
        model.lm_head.weight[9] = math.log(tokens - 1) / 16
    config = KeptConfig(original=str(tmp_path / "seed-{seed}"), documents=4)
    values = Kept().run(subject_of(model, data), config)
    even, half, rest = 1 / tokens, 0.5, 0.5 / (tokens - 1)
    expected = even * math.log(even / half) + (tokens - 1) * even * math.log(even / rest)
    assert values["divergence"] == pytest.approx([expected] * len(values["divergence"]), abs=1e-3)
    assert values["length"] == 32
    same = Kept().run(subject_of(original, data), config)
    assert same["divergence"] == pytest.approx([0.0] * len(same["divergence"]), abs=1e-6)
    assert set(same["agreement"]) == {1.0}


def test_an_original_that_is_not_there_or_has_other_tokens(data: PreparedData, tmp_path: Path) -> None:
    model = model_of(data)
    gone = Kept().run(subject_of(model, data), KeptConfig(original=str(tmp_path / "none")))
    assert "there is no directory" in gone["skipped"]
    torch.manual_seed(0)
    ClearheadForCausalLM(
        ClearheadConfig(vocab_size=9, hidden_size=16, num_attention_heads=2, num_hidden_layers=1)
    ).save_pretrained(tmp_path / "other")
    other = Kept().run(subject_of(model, data), KeptConfig(original=str(tmp_path / "other")))
    assert f"has 9 tokens, the model {len(data.tokenizer)}" in other["skipped"]
