"""Evaluations of models whose layers see a window: what a layer does not see is not counted."""

from __future__ import annotations

import pytest
from transformers import MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from clearhead.evals.internals.anomalous_cases import AnomalousCases, AnomalousCasesConfig
from clearhead.evals.internals.logit_outliers import LogitOutliers, LogitOutliersConfig, far_layers
from clearhead.evals.probing.windows import windows
from clearhead.evals.reasons import Unmeasured
from tests.evals import tiny


def test_each_layer_says_how_far_back_it_sees() -> None:
    assert windows(tiny.llama()) == windows(tiny.ours()) == [None, None]
    assert set(windows(tiny.gpt2())) == {None}
    assert windows(tiny.ours(layers=[{"sliding_window": 2}, {}])) == [2, None]
    assert windows(tiny.ours(sliding_window=6)) == [6, 6]
    sizes = {**tiny.SIZES, "num_key_value_heads": 2, "vocab_size": 320, "sliding_window": 8}
    assert windows(MistralForCausalLM(MistralConfig(**sizes))) == [8, 8]
    mixed = Qwen2Config(**sizes, use_sliding_window=True, layer_types=["full_attention", "sliding_attention"])
    assert windows(Qwen2ForCausalLM(mixed)) == [None, 8]
    assert windows(Qwen2ForCausalLM(Qwen2Config(**sizes, use_sliding_window=False))) == [None, None]


def test_logits_past_the_training_length_are_those_of_layers_that_see_so_far() -> None:
    model = tiny.ours(layers=[{"sliding_window": 2}, {}])
    subject = tiny.subject(model, tiny.store([64] * 2))
    found = LogitOutliers().run(subject, LogitOutliersConfig(length=64, queries=8))
    assert [layer["layer"] for layer in found["scalings"][0]["layers"]] == [1]
    with pytest.raises(ValueError, match="layer 0 sees 2 tokens"):
        LogitOutliers().run(subject, LogitOutliersConfig(length=64, queries=8, layers=[0]))
    narrow = tiny.subject(tiny.ours(sliding_window=6), tiny.store([64] * 2))
    found = LogitOutliers().run(narrow, LogitOutliersConfig(length=64, queries=8))
    assert "every layer sees a window" in found["skipped"]


def test_layers_are_chosen_at_even_steps_of_those_that_see_all() -> None:
    assert far_layers([None] * 8, None) == [1, 3, 5, 7]
    assert far_layers([4, 4, 4, None, 4, 4, 4, None], None) == [3, 7]
    assert far_layers([None, 4], [0]) == [0]
    with pytest.raises(ValueError, match="layer 1 sees 4 tokens"):
        far_layers([None, 4], [0, 1])
    with pytest.raises(Unmeasured, match="every layer"):
        far_layers([4, 4], None)


def test_scores_near_a_token_leave_out_layers_that_see_less() -> None:
    config = AnomalousCasesConfig(length=32, near=4)
    documents = tiny.store([40] * 2)
    found = AnomalousCases().run(
        tiny.subject(tiny.ours(layers=[{"sliding_window": 4}, {}]), documents), config
    )
    assert [layer["layer"] for layer in found["layers"]] == [1]
    found = AnomalousCases().run(tiny.subject(tiny.ours(sliding_window=6), documents), config)
    assert [layer["layer"] for layer in found["layers"]] == [0, 1]
    found = AnomalousCases().run(tiny.subject(tiny.ours(sliding_window=5), documents), config)
    assert "no layer sees 6 tokens" in found["skipped"]
