"""Sliding windows and growing contexts against the same windows computed by hand, one token at a time."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from clearhead.data.readers import CorpusError
from clearhead.evals.asking import losses as scoring
from clearhead.evals.asking.losses import suffix_losses
from clearhead.evals.runner import checked
from clearhead.evals.text.perplexity.evaluation import Perplexity, PerplexityConfig, windows
from clearhead.runs.results import ArmResults, RunResults, SeedResults
from tests.evals import tiny

MODELS = {"llama": tiny.llama, "ours": lambda: tiny.ours(attention="differential")}


def context_by_hand(t: int, total: int, length: int, stride: int, bos: str) -> tuple[int, bool]:
    """Where the window that counts token t starts, and whether a bos stands before it: straight from the definition."""
    first = length - (bos != "none")
    if t < first:
        return 0, bos != "none"
    room = length - (bos == "window")
    end = min(first + math.ceil((t + 1 - first) / stride) * stride, total)
    return max(0, end - room), bos == "window"


def nats_by_hand(model: Any, ids: list[int], t: int, start: int, bos: bool) -> float | None:
    """The loss of token t given bos or not and the tokens from ``start`` on; None if nothing predicts it."""
    before = ([1] if bos else []) + ids[start:t]
    if not before:
        return None
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([before])).logits[0, -1].double()
    return float(-torch.log_softmax(logits, -1)[ids[t]])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("bos", "first_window", "average"),
    [("window", "all", "token"), ("document", "stride", "document"), ("none", "all", "token")],
)
def test_windows_are_those_by_hand(name: str, bos: str, first_window: str, average: str) -> None:
    model = MODELS[name]().double()
    length, stride = 16, 5
    documents = tiny.store([41, 23, 37])
    config = PerplexityConfig(
        lengths=[length], stride=stride, bos=bos, first_window=first_window, average=average,
        max_tokens=38, min_documents=1, segment=0,
    )  # fmt: skip
    (cell,) = Perplexity().run(tiny.subject(model, documents), config)["cells"]
    totals, counts = [], []
    for i in range(3):
        ids = documents.document(i).tolist()[: 38 - (bos != "none")]
        first = min(length - (bos != "none"), len(ids))
        counted = []
        for t in range(len(ids)):
            if first_window == "stride" and t < first - stride:
                continue
            start, has_bos = context_by_hand(t, len(ids), length, stride, bos)
            loss = nats_by_hand(model, ids, t, start, has_bos)
            counted += [] if loss is None else [loss]
        totals.append(sum(counted))
        counts.append(len(counted))
    each = [math.exp(nats / count) for nats, count in zip(totals, counts, strict=True)]
    truth = math.exp(sum(totals) / sum(counts)) if average == "token" else float(np.mean(each))
    assert cell["tokens"] == counts
    assert cell["perplexity"] == pytest.approx(truth, rel=1e-6)
    assert cell["low"] <= cell["perplexity"] <= cell["high"]


def test_the_segment_is_the_same_tokens_after_more_context() -> None:
    model = tiny.ours().double()
    documents = tiny.store([40, 40, 40])
    config = PerplexityConfig(lengths=[8, 16, 32], segment=4, bos="window", min_documents=1)
    values = Perplexity().run(tiny.subject(model, documents), config)["segment"]
    assert values["tokens"] == 4
    for cell in values["cells"]:
        for i, nats in enumerate(cell["nats"]):
            # All documents are cut to the longest length, one of whose tokens is bos.
            ids = documents.document(i).tolist()[:31]
            start = len(ids) - (cell["length"] - 1)
            truth = sum(nats_by_hand(model, ids, t, start, True) or 0.0 for t in range(27, 31))
            assert nats == pytest.approx(truth, abs=1e-4), (cell["length"], i)


def test_every_token_counts_once_and_windows_are_full() -> None:
    for tokens, length, stride, bos in itertools.product(
        (15, 16, 17, 40, 41), (16,), (1, 7, 15, 16), ("window", "document", "none")
    ):
        found = windows(tokens, length, stride, bos, "all")
        counted = [t for window in found for t in range(window.counted, window.stop)]
        assert counted == list(range(0 if bos != "none" else 1, tokens))
        sizes = {window.stop - window.start + window.bos for window in found}
        assert tokens < length - 1 or sizes <= {length, tokens + (bos != "none")}
        assert all(window.start < window.counted or window.bos for window in found)


def test_batching_never_changes_a_score() -> None:
    documents = tiny.store([40, 33, 64, 40])
    config = {"lengths": [8, 16], "stride": 4, "min_documents": 1, "max_tokens": 39}
    model = tiny.llama(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}).double()
    alone, together = (
        Perplexity().run(tiny.subject(model, documents), PerplexityConfig(batch_tokens=size, **config))
        for size in (1, 10**6)
    )
    for one, other in zip(alone["cells"], together["cells"], strict=True):
        assert one["nats"] == other["nats"] and one["tokens"] == other["tokens"]
        assert one["perplexity"] == pytest.approx(other["perplexity"], rel=1e-12)


@pytest.mark.parametrize("first", [1, 7, 22])
def test_pieces_of_logits_are_the_whole(monkeypatch: pytest.MonkeyPatch, first: int) -> None:
    sizes = {
        **tiny.SIZES,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 320,
        "initializer_range": 0.5,
    }
    torch.manual_seed(0)
    capped = Gemma2ForCausalLM(Gemma2Config(**sizes, final_logit_softcapping=2.0)).eval().double()
    ids = torch.from_numpy(np.random.default_rng(0).integers(3, 320, (2, 24)))
    monkeypatch.setattr(scoring, "LOGITS_AT_ONCE", 5 * 2 * 320)
    for model in (capped, tiny.ours().double(), tiny.gpt2().double()):
        with torch.no_grad():
            logits = model(input_ids=ids).logits
            found = suffix_losses(model, ids, first)
            again = model(input_ids=ids).logits
        truth = -torch.log_softmax(logits, -1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
        torch.testing.assert_close(found, truth[:, first - 1 :], rtol=0, atol=1e-10)
        assert torch.equal(logits, again), "the decoder is itself again"


def test_a_token_without_a_predecessor_has_no_loss() -> None:
    ids = torch.ones(1, 8, dtype=torch.long)
    for first in (0, 8):
        with pytest.raises(ValueError, match="can be predicted"):
            suffix_losses(tiny.llama(), ids, first)


def test_a_dynamic_scaling_keeps_no_state_between_lengths() -> None:
    scaling = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    documents = tiny.store([64] * 3)
    model = tiny.llama(rope_parameters=scaling).double()
    config = {"segment": 0, "bos": "window", "min_documents": 1, "max_tokens": 64}
    longer_first = Perplexity().run(tiny.subject(model, documents), PerplexityConfig(lengths=[64], **config))
    both = Perplexity().run(tiny.subject(model, documents), PerplexityConfig(lengths=[32, 64], **config))
    # By hand: a fresh model for each window, so that nothing can be left over.
    nats = []
    for i in range(3):
        ids = documents.document(i).tolist()[:63]
        total = 0.0
        for window in windows(63, 32, 16, "window", "all"):
            fresh = tiny.llama(rope_parameters=scaling).double()
            row = torch.tensor([[1, *ids[window.start : window.stop]]])
            with torch.no_grad():
                logs = torch.log_softmax(fresh(input_ids=row).logits[0], -1)
            total -= sum(float(logs[t - window.start, ids[t]]) for t in range(window.counted, window.stop))
        nats.append(total)
    assert both["cells"][0]["nats"] == pytest.approx(nats, abs=1e-4)
    assert both["cells"][1]["nats"] == longer_first["cells"][0]["nats"]


def test_windows_open_as_the_rows_of_training_did() -> None:
    documents, model = tiny.store([40] * 4), tiny.llama()
    asked = PerplexityConfig(lengths=[16], segment=0)
    for foreign, opening in ((False, "none"), (True, "window")):
        subject = tiny.subject(model, documents, external=foreign)
        found = Perplexity().run(subject, asked)
        assert found["bos"] == opening
        named = Perplexity().run(subject, asked.model_copy(update={"bos": opening}))
        assert found["cells"] == named["cells"]


def test_bits_per_byte_are_of_the_counted_text() -> None:
    words = tiny.tokenizer()
    ids = words.encode("The grass is green and the sky is blue. " * 4, add_special_tokens=False)
    from clearhead.data.store import TokenStore

    documents = TokenStore.from_documents([ids], bos_token_id=1)
    config = PerplexityConfig(lengths=[16], segment=0, bos="window", min_documents=1, max_tokens=len(ids) + 1)
    (cell,) = Perplexity().run(tiny.subject(tiny.llama(), documents), config)["cells"]
    assert cell["bytes"] == [160] and cell["tokens"] == [len(ids)]
    assert cell["bits_per_byte"] == pytest.approx(cell["nats"][0] / math.log(2) / 160, rel=1e-6)


def test_lengths_without_text_and_models_without_reach_are_left_out_with_their_reason() -> None:
    documents = tiny.store([70, 70, 20])
    config = PerplexityConfig(lengths=[16, 64, 128], min_documents=2)
    values = Perplexity().run(tiny.subject(tiny.gpt2(), documents), config)
    assert [cell["length"] for cell in values["cells"]] == [16] and values["n"] == 2
    assert values["skipped_cells"] == {
        "64": "64 tokens is more than the model takes (max_position_embeddings = 32)",
        "128": "only 0 of 3 documents have 128 tokens, at least 2 are needed",
    }
    nothing = Perplexity().run(tiny.subject(tiny.gpt2(), documents), PerplexityConfig(lengths=[128]))
    assert "longer texts" in nothing["skipped"] and "cells" not in nothing


def test_a_broken_model_is_no_number() -> None:
    model = tiny.llama()
    model.lm_head.weight.data.fill_(math.nan)
    values = Perplexity().run(tiny.subject(model), PerplexityConfig(lengths=[16]))
    assert values == {"skipped": "the losses are not numbers"}


def test_texts_from_files(tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("the sky is blue and the grass is green.\n\n" * 2000)
    config = {"lengths": [16], "min_documents": 1, "max_tokens": 32}
    values = Perplexity().run(tiny.subject(tiny.llama()), PerplexityConfig(texts=[str(book)], **config))
    assert values["documents"] == ["book.txt"], "a book stays one document"
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(CorpusError, match="is empty"):
        Perplexity().run(
            tiny.subject(tiny.llama()), PerplexityConfig(texts=[str(tmp_path / "empty.txt")], **config)
        )


def test_unknown_options_are_named() -> None:
    with pytest.raises(ValueError, match="perplexity has no option 'stried': did you mean 'stride'"):
        checked("perplexity", {"stried": 3})
    with pytest.raises(ValueError, match=r"perplexity\.bos"):
        checked("perplexity", {"bos": "always"})


def run_of(values: dict[str, dict[str, Any]]) -> RunResults:
    arms = [
        ArmResults(
            name, name, "softmax", {0: SeedResults(results={"perplexity": {"config": {}, "values": v}})}
        )
        for name, v in values.items()
    ]
    return RunResults({"name": "run"}, {}, arms)


def test_the_report_says_when_there_is_no_difference() -> None:
    documents = tiny.store([40] * 6)
    config = PerplexityConfig(lengths=[16, 32], min_documents=1)
    first = Perplexity().run(tiny.subject(tiny.llama(), documents), config)
    section = Perplexity().section(run_of({"A": first, "B": first}))
    assert section.answer.startswith("In windows of 32 tokens, 2 times the training length: No difference")
    assert section.headlines[0].estimate is not None and section.headlines[0].estimate.n == 6
    worse = tiny.llama()
    worse.lm_head.weight.data.mul_(3)
    second = Perplexity().run(tiny.subject(worse, documents), config)
    section = Perplexity().section(run_of({"A": first, "B": second}))
    assert "B is worse than A by" in section.answer
    assert section.tables[0].title.startswith("Perplexity in sliding windows")
    skipped = Perplexity().section(run_of({"A": {"skipped": "too long"}}))
    assert skipped.missing and "A: too long" in skipped.answer
