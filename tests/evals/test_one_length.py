"""Under scalings that look at the length, numbers are those of a text read alone, by a model that has read nothing."""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clearhead.evals.external.harness import harness_model, in_groups
from clearhead.evals.in_context import shared as in_context
from clearhead.evals.in_context.many_shot.evaluation import ManyShot, ManyShotConfig
from clearhead.evals.probing.adapter import adapter_of
from clearhead.evals.probing.rescaling import rescaled
from clearhead.evals.retrieval.multi_needle.evaluation import MultiNeedle, MultiNeedleConfig
from clearhead.evals.text.ar_hit import ArHit, ArHitConfig
from clearhead.evals.text.language_modelling import LanguageModelling, LanguageModellingConfig, cut
from clearhead.evals.text.loss_by_position import LossByPosition, LossByPositionConfig
from clearhead.positions.length import UnknownLengthsWarning
from tests.evals import tiny

DYNAMIC: dict[str, Any] = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "short_factor": [1.0] * 4, "long_factor": [8.0] * 4,
    "original_max_position_embeddings": 16,
}  # fmt: skip
MAKERS: dict[str, Callable[[], Any]] = {
    "dynamic": lambda: tiny.ours(400, attention="differential", rope_parameters=DYNAMIC).double(),
    "longrope": lambda: tiny.ours(400, rope_parameters=LONGROPE).double(),
    "theirs dynamic": lambda: tiny.llama(400, rope_parameters=DYNAMIC).double(),
    "theirs longrope": lambda: tiny.llama(400, rope_parameters=LONGROPE).double(),
}
each_model = pytest.mark.parametrize("name", MAKERS)


def alone(name: str, ids: list[int]) -> torch.Tensor:
    """Log-likelihoods (L - 1,) of a row's tokens by a fresh model that reads nothing else."""
    with torch.inference_mode():
        logits = MAKERS[name]()(torch.tensor([ids]), use_cache=False).logits[0, :-1]
    return logits.log_softmax(-1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]


@each_model
def test_bits_per_byte_are_those_of_windows_read_alone(name: str) -> None:
    documents = tiny.store([61, 37, 52, 44])
    subject = tiny.subject(MAKERS[name](), documents)
    found = LanguageModelling().run(subject, LanguageModellingConfig(length=48, stride=20))
    expected = []
    for index in range(4):
        tokens = np.concatenate([[1], documents.document(index)])
        nats = [alone(name, row.tolist())[first - 1 :].sum() for row, first in cut(tokens, 48, 20)]
        expected.append(-float(torch.stack(nats).sum()) / math.log(2))
    # Hugging Face's settled frequencies are in float32, made by another order of the same operations.
    assert found["bits"] == pytest.approx(expected, abs=2e-3 if "theirs" in name else 1e-4)


@each_model
def test_what_was_read_before_changes_no_loss(name: str) -> None:
    def losses(model: Any) -> list[float]:
        config = LossByPositionConfig(length=40, bos="none", buckets=8)
        subject = tiny.subject(model, tiny.store([40] * 4, vocabulary=20))
        curve: list[float] = LossByPosition().run(subject, config)["loss"]["mean"]
        hits = ArHit().run(subject, ArHitConfig(length=24, n=1))["slices"]["1"]["others_nats"]
        return [*curve, *hits]

    model = MAKERS[name]()
    with torch.inference_mode():
        model(torch.arange(3, 99)[None])
    assert losses(model) == losses(MAKERS[name]())


@each_model
def test_other_cells_change_no_answer(name: str, tmp_path: Path) -> None:
    def answers(folder: str, pairs: list[tuple[int, int]]) -> list[str]:
        settings = {"depths": [0.5], "samples": 2, "haystacks": 1, "length": 150, "save_prompts": False}
        config = MultiNeedleConfig(pairs=pairs, grid=None, **settings)  # type: ignore[arg-type]
        (tmp_path / folder).mkdir()
        subject = tiny.subject(MAKERS[name](), folder=tmp_path / folder, tokenizer=tiny.tokenizer(400))
        MultiNeedle().run(subject, config)
        rows = map(json.loads, (tmp_path / folder / "multi_needle.jsonl").read_text().splitlines()[1:])
        return [row["answer"][:40] for row in rows if row["needles"] == 1]

    assert answers("one", [(1, 1)]) == answers("two", [(1, 1), (2, 2)])


def test_a_question_is_settled_for_its_own_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the answer would depend on which other texts are asked."""
    words = ["sky", "grass is green", "what is hidden here and there", "blue", "keys are blue", "passkey"]
    lines = [{"text": f"{word} {i}", "label": "ab"[i % 2]} for i in range(4) for word in words]
    source = tmp_path / "set.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    seen: list[tuple[set[int], int | None]] = []

    class Recording(in_context.LogitReader):
        def __init__(
            self, model: Any, prompts: Any, *given: Any, length: int | None = None, **more: Any
        ) -> None:
            seen.append(({len(prompt) for prompt in prompts}, length))
            super().__init__(model, prompts, *given, length=length, **more)

    monkeypatch.setattr(in_context, "LogitReader", Recording)
    config = ManyShotConfig(sets=[str(source)], shots=[2], items=8, draws=1, length=200)
    ManyShot().run(tiny.subject(MAKERS["dynamic"]()), config)
    assert len(seen) > 1 and all(len(lengths) == 1 for lengths, _ in seen)
    assert len({length - min(lengths) for lengths, length in seen if length is not None}) == 1
    seen.clear()
    ManyShot().run(tiny.subject(tiny.ours(400)), config)
    assert len(seen) == 1


def test_a_scaling_that_is_tried_counts_like_the_models_own() -> None:
    model = tiny.ours()
    adapter = adapter_of(model)
    assert not adapter.keys_depend_on_request() and not adapter.frequencies_depend_on_length()
    assert adapter.frequencies_depend_on_length(DYNAMIC)
    with rescaled(model, DYNAMIC, trained=16):
        assert adapter.keys_depend_on_request() and adapter.frequencies_depend_on_length()
    assert not adapter.keys_depend_on_request()


def test_frequencies_of_another_model_are_settled_for_a_request_and_keys_do_not_depend_on_it() -> None:
    adapter = adapter_of(tiny.llama(rope_parameters={**DYNAMIC, "rope_theta": 1e4}))
    assert adapter.frequencies_depend_on_length() and not adapter.keys_depend_on_request()


@each_model
def test_the_harness_scores_a_request_as_if_it_were_alone(name: str) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance

    words = tiny.tokenizer(400)
    texts = ["the sky", "grass is green and" * 3, "what is hidden here?" * 5, "a", "the key"]
    requests = [
        Instance("loglikelihood", {}, (text, " the grass is green"), i) for i, text in enumerate(texts)
    ]
    reader = harness_model(MAKERS[name](), words, 4, max_length=400)
    found = [score for score, _ in reader.loglikelihood(requests, disable_tqdm=True)]
    expected = []
    for text in texts:
        ids = words(text, add_special_tokens=False)["input_ids"]
        both = words(f"{text} the grass is green", add_special_tokens=False)["input_ids"]
        # The last token is not read: the request is one token shorter.
        with torch.inference_mode():
            logits = MAKERS[name]()(torch.tensor([both[:-1]]), use_cache=False).logits[0].log_softmax(-1)
        expected.append(float(logits[range(len(ids) - 1, len(both) - 1), both[len(ids) :]].sum()))
    assert found == pytest.approx(expected, abs=1e-4)


@each_model
def test_the_harness_gets_the_answer_of_a_request_alone(name: str) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance

    words = tiny.tokenizer(400)
    texts = ["the sky", "grass is green and " * 3, "what is hidden here? " * 5]

    def answers(chosen: list[str]) -> list[str]:
        requests = [
            Instance("generate_until", {}, (text, {"until": [], "max_gen_toks": 12}), i)
            for i, text in enumerate(chosen)
        ]
        return list(harness_model(MAKERS[name](), words, 4, max_length=400).generate_until(requests, True))

    assert answers(texts) == [answers([text])[0] for text in texts]


def test_groups_give_results_in_their_order() -> None:
    found = in_groups(["aa", "b", "cc", "d"], len, lambda size, some: [f"{size}{item}" for item in some])
    assert found == ["2aa", "1b", "2cc", "1d"]


def test_rows_that_may_be_padded_are_warned_of() -> None:
    model = copy.deepcopy(MAKERS["dynamic"]())
    ids = torch.arange(3, 63).view(2, 30)
    with pytest.warns(
        UnknownLengthsWarning, match=r"2 rows of 30 tokens came without attention_mask and rope_length"
    ):
        model(ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(ids[:1])
        model(ids[:, :16])
        model(ids, attention_mask=torch.ones_like(ids))
        model(ids, rope_length=30)
        model.train()(ids)
        LossByPosition().run(tiny.subject(model), LossByPositionConfig(length=40))
        tiny.ours()(ids)
