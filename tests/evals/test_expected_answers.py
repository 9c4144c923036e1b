"""Answers that are expected are read, not written: the same answers, in fewer steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache, GenerationConfig

from clearhead.evals.asking.decoding import AskedPrompt, answer, confirmed
from clearhead.evals.retrieval.multi_needle.evaluation import MultiNeedle, MultiNeedleConfig
from tests.evals import tiny
from tests.evals.test_multineedle import SMALL, Oracle, all_right, for_some, subject_of
from tests.evals.test_multineedle_prompts import plain


class Foresight(Oracle):
    """An oracle that is asked at every place that logits are kept of."""

    def forward(self, input_ids: torch.Tensor, logits_to_keep: int = 0, **settings: Any) -> Any:  # type: ignore[override]
        before = settings["past_key_values"].get_seq_length()
        out = super().forward(input_ids, **settings)
        keys = out.past_key_values.layers[0].keys[:, 0, :, 0].long()
        for row, ids in enumerate(keys.tolist()):
            for place in range(input_ids.shape[1] - logits_to_keep, input_ids.shape[1]):
                out.logits[row, place] = 0
                out.logits[row, place, self._next(ids[: before + place + 1])] = 9.0
        return out


def run(reply: Any, folder: Path, **settings: Any) -> tuple[list[str], Foresight]:
    words = plain()
    model = Foresight(words, reply).eval()
    folder.mkdir()
    config = MultiNeedleConfig(**{**SMALL, "pairs": [(1, 1)], "grid": None, **settings})
    MultiNeedle().run(subject_of(model, words, folder), config)
    rows = [json.loads(line) for line in (folder / "multi_needle.jsonl").read_text().splitlines()][1:]
    return [r["answer"] for r in sorted(rows, key=lambda r: (r["depth"], r["index"]))], model


@pytest.mark.parametrize("batch_tokens", [1, 4000])
def test_right_and_wrong_answers_are_those_of_plain_decoding(tmp_path: Path, batch_tokens: int) -> None:
    alone, slow = run(for_some, tmp_path / "alone", share_prefix=False, batch_tokens=1)
    found, fast = run(for_some, tmp_path / "shared", batch_tokens=batch_tokens)
    assert found == alone and 0 < sum(bool(text.strip()) for text in found) < len(found)
    assert fast.calls < slow.calls


def test_right_answers_take_no_step(tmp_path: Path) -> None:
    found, model = run(all_right, tmp_path / "run", depths=[1.0], haystacks=1, batch_tokens=4000)
    # What is shared, and the four prompts with their answers.
    assert all(text.strip().isdigit() for text in found) and model.calls == 2


def test_a_random_model_confirms_what_it_says_and_nothing_else() -> None:
    """float64: the greedy continuation is confirmed, any other is not, whatever it is batched with."""
    model, rng = tiny.llama(320).double(), np.random.default_rng(0)
    ids = rng.integers(3, 320, (3, 40))
    with torch.inference_mode():
        said = model.generate(
            torch.from_numpy(ids), max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0
        )[:, 40:].numpy()
        wrong = said[1].copy()
        wrong[4] = (wrong[4] + 1) % 320
        answers = [said[0], wrong, said[2][:3]]
        asked = [AskedPrompt(row, (), False, 5, one) for row, one in zip(ids, answers, strict=True)]
        cache = DynamicCache()
        assert confirmed(model, asked, cache) == [True, False, True] and cache.get_seq_length() == 39
        # An answer that the budget has no room for cannot be given.
        short = [AskedPrompt(ids[0], (), False, 4, said[0])]
        assert confirmed(model, short, DynamicCache()) == [False]
        words = tiny.tokenizer()
        settings = GenerationConfig(do_sample=False, eos_token_id=2, pad_token_id=0)
        common = np.concatenate((ids[0][:10], ids[1][10:20]))
        mixed = [AskedPrompt(np.concatenate((ids[0][:30], row[30:])), ("none",), False, 5) for row in ids]
        shared = dict(answer(model, words, mixed, settings, common=common))
        assert shared == dict(answer(model, words, mixed, settings, batch_tokens=1))
