"""Evaluations of encoders and encoder-decoders against sums by hand, and what cannot be asked of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clearhead.data.masking import text_bytes
from clearhead.data.packing import IGNORED
from clearhead.data.tokenizer import train_bpe, wrap
from clearhead.evals.asking.masked import MaskConfig, guess, hide
from clearhead.evals.evaluation import Unmeasured
from clearhead.evals.internals.anomalous_cases import AnomalousCases, AnomalousCasesConfig
from clearhead.evals.internals.answer_attention import (
    AnswerAttention,
    AnswerAttentionConfig,
    laid_out,
)
from clearhead.evals.retrieval.needles import Needles
from clearhead.evals.subject import Subject
from clearhead.evals.text.classification import Classification, ClassificationConfig, macro_f1
from clearhead.evals.text.masked_by_length import MaskedByLength, MaskedByLengthConfig
from clearhead.evals.text.masked_language_modelling import (
    MaskedLanguageModelling,
    MaskedLanguageModellingConfig,
)
from clearhead.evals.text.target_modelling import same_text
from clearhead.models import (
    ClearheadEncoderConfig,
    ClearheadEncoderForSequenceClassification,
    ClearheadForMaskedLM,
)
from tests.evals import tiny

TOKENIZER = wrap(train_bpe([tiny.WORDS] * 4, 320, mask=True), mask=True)
SIZES = {**tiny.SIZES, "max_position_embeddings": 16, "initializer_range": 0.2, "vocab_size": 320}


def encoder(attention: str = "softmax", **settings: Any) -> ClearheadForMaskedLM:
    torch.manual_seed(0)
    return ClearheadForMaskedLM(ClearheadEncoderConfig(attention=attention, **SIZES, **settings)).eval()


def subject(model: Any, documents: Any = None, **settings: Any) -> Subject:
    return tiny.subject(model, documents, **{"tokenizer": TOKENIZER, "task": "masked", **settings})


def test_bits_of_hidden_tokens_are_those_of_windows_read_alone() -> None:
    model, store = encoder("differential_v2").double(), tiny.store([61, 37, 52, 9], len(TOKENIZER))
    found = MaskedLanguageModelling().run(subject(model, store), MaskedLanguageModellingConfig(length=16))
    hidden = hide(subject(model, store), range(4), MaskConfig())
    for index, document in enumerate(hidden):
        ids = store.document(index).astype(np.int64)
        asked = document.labels != IGNORED
        assert (document.labels[asked] == ids[asked]).all() and (document.shown[asked] == 3).all()
        assert (document.shown[~asked] == ids[~asked]).all()
        bits = 0.0
        for start in range(0, len(ids), 15):
            shown = torch.tensor([[1, *document.shown[start : start + 15]]])
            with torch.inference_mode():
                likely = model(input_ids=shown).logits[0, 1:].log_softmax(-1)
            for place, label in enumerate(document.labels[start : start + 15]):
                bits -= float(likely[place, label]) / math.log(2) if label != IGNORED else 0.0
        # Losses are taken in float32.
        assert found["bits"][index] == pytest.approx(bits, rel=1e-5, abs=2e-4)
        assert found["hidden"][index] == asked.sum()
    assert found["bits_per_byte"] == pytest.approx(sum(found["bits"]) / sum(found["bytes"]), rel=1e-6)
    assert 0.2 < found["tokens"] / 159 < 0.4


def test_bytes_are_those_of_the_hidden_tokens() -> None:
    text = tiny.WORDS * 3
    from clearhead.data.store import TokenStore

    ids = TOKENIZER.encode(text, add_special_tokens=False)
    store = TokenStore.from_documents([ids], bos_token_id=1, utf8_bytes=[len(text)])
    (found,) = hide(subject(encoder(), store), [0], MaskConfig())
    pieces = TOKENIZER.convert_ids_to_tokens(found.labels[found.labels != IGNORED].tolist())
    assert found.bytes == sum(map(len, pieces))


def test_every_length_asks_for_the_same_tokens() -> None:
    store = tiny.store([70, 80, 20], len(TOKENIZER))
    here = subject(encoder(), store)
    found = MaskedByLength().run(here, MaskedByLengthConfig(lengths=[16, 32, 64]))
    assert [cell["length"] for cell in found["cells"]] == [16, 32, 64]
    assert found["n"] == 2
    documents = hide(here, [0, 1], MaskConfig())
    assert found["tokens"] == sum(int((one.labels != IGNORED).sum()) for one in documents)
    for cell in found["cells"]:
        alone = guess(here, documents, cell["length"], 8192)
        assert cell["bits"] == [round(float(bits), 4) for bits in alone.bits]
    with pytest.raises(Unmeasured, match=r"only 0 documents have 512 tokens.*masked_by_length\.lengths"):
        MaskedByLength().result(here, MaskedByLengthConfig(lengths=[16, 512]))


def test_accuracy_and_macro_f1() -> None:
    from sklearn.metrics import f1_score

    rng = np.random.default_rng(0)
    truth, given = rng.integers(0, 5, 60), rng.integers(0, 4, 60)
    assert macro_f1(truth, given) == pytest.approx(f1_score(truth, given, average="macro"))
    torch.manual_seed(0)
    model = ClearheadEncoderForSequenceClassification(ClearheadEncoderConfig(**SIZES, num_labels=3)).eval()
    rows = []
    for i in range(20):
        size = int(rng.integers(3, 16))
        ids = np.pad(rng.integers(4, 320, size), (0, 16 - size))
        real = (np.arange(16) < size).astype(np.int64)
        rows.append({"input_ids": ids, "attention_mask": real, "labels": np.array(i % 3)})
    here = subject(model, task="classify", held_out=lambda count: rows[:count], labels=("a", "b", "c"))
    found = Classification().run(here, ClassificationConfig(batch=7))
    given = []
    for row in rows:
        size = int(row["attention_mask"].sum())
        with torch.inference_mode():
            given.append(int(model(input_ids=torch.tensor(row["input_ids"][None, :size])).logits.argmax()))
    assert found["given"] == given and found["truth"] == [i % 3 for i in range(20)]
    assert found["accuracy"] == np.mean(np.equal(given, found["truth"]))


def cases_by_hand(model: Any, ids: list[int], places: range, near: int, both: bool) -> tuple[Any, float]:
    """Shares of the four cases and of rising scores of layer 0 of a softmax model, with loops over everything."""
    layer = model.model.layers[0]
    x = layer.input_layernorm(model.model.embed_norm(model.model.embed_tokens(torch.tensor([ids]))))[
        0
    ].double()
    heads, width = 4, 8
    q, k = (
        (x @ projection.weight.double().T).view(len(ids), heads, width)
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj)
    )
    theta = [10000.0 ** (-2 * j / width) for j in range(width // 2)]
    weights, rises = dict.fromkeys("abcd", 0.0), []
    for head in range(heads):
        for m in places:
            for distance in range(1, near + 1):
                for n in (m - distance, m + distance) if both else (m - distance,):
                    now = then = 0.0
                    for j in range(width // 2):
                        one = complex(*q[m, head, [j, j + width // 2]].tolist())
                        two = complex(*k[n, head, [j, j + width // 2]].tolist())
                        size = abs(one) * abs(two)
                        angle = math.atan2((one / two).imag, (one / two).real) % (2 * math.pi)
                        step = math.copysign(theta[j], m - n)
                        now += size * math.cos(angle + distance * step)
                        then += size * math.cos(angle + (distance + 1) * step)
                        name = ("ac" if m < n else "bd")[int(angle > math.pi)]
                        weights[name] += size
                    rises.append(then > now)
    total = sum(weights.values())
    return [weights[name] / total for name in "abcd"], float(np.mean(rises))


@pytest.mark.parametrize("task", ["masked", "causal"])
def test_the_four_cases_are_those_of_loops(task: str) -> None:
    model, store = encoder().double(), tiny.store([40], len(TOKENIZER))
    here = subject(model, store, task=task)
    config = AnomalousCasesConfig(length=16, near=4, positions=8, documents=1)
    found = AnomalousCases().run(here, config)
    ids = [1, *store.document(0)[:15].tolist()]
    with torch.inference_mode():
        shares, rising = cases_by_hand(model, ids, range(4, 12), 4, task == "masked")
    assert found["layers"][0]["shares"][0] == pytest.approx(shares, abs=1e-6)
    assert found["layers"][0]["rises"][0] == pytest.approx(rising, abs=1e-6)
    assert np.mean(found["layers"][0]["by_distance"]) == pytest.approx(rising, abs=1e-5)
    assert found["sides"] == (2 if task == "masked" else 1)


def test_collinear_attention_has_no_anomalous_case() -> None:
    found = AnomalousCases().run(
        subject(encoder("collinear"), tiny.store([40], len(TOKENIZER))), AnomalousCasesConfig(length=16)
    )
    for layer in found["layers"]:
        a, b, c, d = layer["shares"][0]
        assert (a, d) == (0.0, 0.0) and b + c == pytest.approx(1.0)
        # The fastest pair turns by 1 radian a token: no score rises before it has come half round.
        assert layer["by_distance"][:2] == [0.0, 0.0]


def test_slack_and_alibi_have_no_cases() -> None:
    slack = AnomalousCases().run(
        subject(encoder("collinear", attention_options={"mode": "slack"}), tiny.store([40], len(TOKENIZER))),
        AnomalousCasesConfig(length=16),
    )
    assert "slack collinear attention has no score" in slack["skipped"]
    alibi = AnomalousCases().run(
        subject(encoder(position="alibi"), tiny.store([40], len(TOKENIZER))), AnomalousCasesConfig(length=16)
    )
    assert "no layer turns queries and keys" in alibi["skipped"]


def test_the_share_on_the_answer_is_that_of_the_maps(tmp_path: Path) -> None:
    paragraph = "The sky is blue and the grass is green; what is hidden here? A passkey."
    article = {
        "title": "t",
        "paragraphs": [
            {"context": paragraph, "qas": [{"question": "What is hidden?", "answers": ["passkey"]}]}
        ],
    }
    (tmp_path / "a.jsonl").write_text(json.dumps(article))
    model = encoder("differential")
    here = subject(model)
    config = AnswerAttentionConfig(data=str(tmp_path / "a.jsonl"), length=64)
    found = AnswerAttention().run(here, config)
    text = laid_out(here, paragraph, "What is hidden?", "passkey", 64)
    assert text is not None
    assert TOKENIZER.decode(text.ids[text.answer]).strip() == "passkey"
    assert TOKENIZER.decode(text.ids[text.question :]) == "\nWhat is hidden?"
    with torch.inference_mode():
        maps = model(input_ids=torch.tensor(text.ids[None]), output_attentions=True).attentions
    shares = []
    for layer in maps:
        rows = layer[0, :, text.question :].double().abs()
        shares.append((rows[..., text.answer].sum(-1) / rows.sum(-1)).mean(-1))
    expected = torch.stack(shares)
    size = (text.answer.stop - text.answer.start) / len(text.ids)
    assert found["share"] == pytest.approx(float(expected.mean()), abs=1e-5)
    assert found["times"] == [pytest.approx(float(expected.mean()) / size, rel=1e-3)]
    assert np.array(found["heads"]) == pytest.approx((expected / size).numpy(), rel=1e-3)
    # Too long for the row: cut on both sides, with the answer in it.
    cut = laid_out(here, "so it is. " * 30 + paragraph + " so it is." * 30, "What?", "passkey", 40)
    assert cut is not None and len(cut.ids) == 40 and "passkey" in TOKENIZER.decode(cut.ids[cut.answer])


def test_what_a_model_was_not_trained_for_is_said() -> None:
    config: Any = Needles.Config()
    assert Needles().run(subject(encoder()), config)["skipped"] == (
        "needles asks a causal language model; this model is an encoder, which predicts hidden tokens"
    )
    found = MaskedLanguageModelling().run(tiny.subject(tiny.ours()), MaskedLanguageModellingConfig())
    assert found["skipped"] == (
        "masked_language_modelling asks an encoder, which predicts hidden tokens; this model is a causal language model"
    )
    assert "name them in evaluate.answer_attention.data" in AnswerAttention().run(
        subject(encoder()), AnswerAttentionConfig()
    )["skipped"]  # fmt: skip


def test_targets_that_end_within_a_character_have_the_bytes_of_their_tokens() -> None:
    ids = TOKENIZER.encode("\u0416\u042e", add_special_tokens=False)  # Four tokens of a byte each.
    assert len(ids) == 4
    assert text_bytes(TOKENIZER, [[*ids, 2], [*ids[1:3], 2, 0], ids[:1]]) == [4, 2, 1]
    assert same_text(TOKENIZER, [1, *ids, 2, 0], [*ids, 2])
    # Both are decoded to the same sign.
    assert TOKENIZER.decode(ids[:1]) == TOKENIZER.decode(ids[1:2])
    assert not same_text(TOKENIZER, ids[:1], ids[1:2]) and same_text(TOKENIZER, ids[:1], [*ids[:1], 2])
