"""Heads for classes of texts, of tokens, and for answers: they learn, and read the tokens that they should."""

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from clearhead.models import (
    ClearheadEncoderForMultipleChoice,
    ClearheadEncoderForQuestionAnswering,
    ClearheadEncoderForSequenceClassification,
    ClearheadEncoderForTokenClassification,
    ClearheadForQuestionAnswering,
    ClearheadForSequenceClassification,
    ClearheadForTokenClassification,
)
from tests.contracts.encoder_cases import encoder_config, make_encoder
from tests.contracts.model_cases import VARIANTS, make_config, make_model, tokens
from tests.contracts.support import distance

IDS = tokens(6, 5)
# A class by the text's last token, a class by each token, and where two tokens stand.
LABELS: dict[Any, dict[str, torch.Tensor]] = {
    ClearheadForSequenceClassification: {"labels": IDS[:, -1] % 3},
    ClearheadForTokenClassification: {"labels": IDS % 3},
    ClearheadForQuestionAnswering: {
        "start_positions": IDS.argmin(-1),
        "end_positions": IDS.argmax(-1),
    },
}
# The encoder's read the whole text: also a class by the first token, and which of three texts it is.
LABELS |= {
    ClearheadEncoderForSequenceClassification: {"labels": IDS[:, 0] % 3},
    ClearheadEncoderForTokenClassification: {"labels": IDS.roll(-1, 1) % 3},
    ClearheadEncoderForQuestionAnswering: LABELS[ClearheadForQuestionAnswering],
    ClearheadEncoderForMultipleChoice: {"labels": torch.tensor([1, 0])},
}
each_head = pytest.mark.parametrize("head", LABELS)


@each_head
@pytest.mark.parametrize("name", ["softmax", "differential", "differential_v2_collinear"])
def test_a_head_learns_and_its_gradient_reaches_all(head: Any, name: str) -> None:
    torch.manual_seed(0)
    choices = head is ClearheadEncoderForMultipleChoice
    config = encoder_config if "Encoder" in head.__name__ else make_config
    model = head(config(name, num_labels=3))
    model.train()
    given = IDS.view(2, 3, -1) if choices else IDS
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for _ in range(25):
        loss = model(input_ids=given, **LABELS[head]).loss
        optimizer.zero_grad()
        loss.backward()
        losses.append(float(loss.detach()))
        if len(losses) == 1:
            without = [n for n, p in model.named_parameters() if p.grad is None or not bool(p.grad.any())]
            # What is added to all choices alike decides nothing.
            assert set(without) <= ({"classifier.bias"} if choices else set())
        optimizer.step()
    assert losses[-1] < 0.35 * losses[0]


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_text_is_judged_by_its_last_real_token(name: str, side: str) -> None:
    model = ClearheadForSequenceClassification(make_config(name, num_labels=3)).double().eval()
    short, long = tokens(1, 3, seed=1), tokens(1, 6, seed=2)
    padding = torch.zeros(1, 3, dtype=torch.long)
    row = torch.cat((padding, short) if side == "left" else (short, padding), 1)
    batch = torch.cat((row, long))
    found = model(input_ids=batch, attention_mask=(batch != 0).long()).logits
    for index, text in enumerate((short, long)):
        state = model.model(input_ids=text).last_hidden_state[0, -1]
        assert distance(found[index], model.score.weight @ state) < 1e-10


def test_a_batch_without_a_padding_token_is_refused() -> None:
    model = ClearheadForSequenceClassification(make_config("softmax", pad_token_id=None))
    with pytest.raises(ValueError, match="no padding token"):
        model(input_ids=IDS)


@each_head
def test_a_head_takes_the_layers_of_a_language_model_and_gives_them_back(head: Any, tmp_path: Any) -> None:
    encoder = "Encoder" in head.__name__
    language = (make_encoder if encoder else make_model)("differential", num_labels=3)
    language.save_pretrained(tmp_path / "language")
    (auto,) = (
        auto
        for auto in (
            AutoModelForSequenceClassification,
            AutoModelForTokenClassification,
            AutoModelForQuestionAnswering,
            AutoModelForMultipleChoice,
        )
        if head.__name__.endswith(auto.__name__.removeprefix("AutoModel"))
    )
    model = auto.from_pretrained(tmp_path / "language")
    assert type(model) is head
    model.save_pretrained(tmp_path / "head")
    again = auto.from_pretrained(tmp_path / "head")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    if encoder:
        assert torch.equal(model.head.dense.weight, language.head.dense.weight)
    back = (AutoModelForMaskedLM if encoder else AutoModelForCausalLM).from_pretrained(tmp_path / "head")
    assert torch.equal(back.model.layers[1].mlp.up_proj.weight, language.model.layers[1].mlp.up_proj.weight)


@torch.no_grad()
def test_an_answer_is_where_its_logits_say() -> None:
    model = ClearheadForQuestionAnswering(make_config("differential")).double().eval()
    found = model(input_ids=IDS)
    states = model.model(input_ids=IDS).last_hidden_state
    expected = states @ model.qa_outputs.weight.T + model.qa_outputs.bias
    assert distance(found.start_logits, expected[..., 0]) < 1e-10
    assert distance(found.end_logits, expected[..., 1]) < 1e-10


@torch.no_grad()
def test_a_choice_is_the_text_that_is_judged_highest_wherever_it_stands() -> None:
    model = ClearheadEncoderForMultipleChoice(encoder_config("differential")).double().eval()
    texts = IDS.view(2, 3, -1)
    mask = torch.ones_like(texts)
    mask[:, 1, 3:] = 0
    found = model(input_ids=texts, attention_mask=mask).logits
    assert found.shape == (2, 3)
    order = [2, 0, 1]
    assert (
        distance(model(input_ids=texts[:, order], attention_mask=mask[:, order]).logits, found[:, order])
        < 1e-10
    )
    alone = model(input_ids=texts[:1, 1:2, :3]).logits
    assert distance(alone[0, 0], found[0, 1]) < 1e-10


@torch.no_grad()
def test_an_answer_of_an_encoder_reads_the_prediction_head() -> None:
    model = make_encoder("differential", dtype=torch.float64, head=ClearheadEncoderForQuestionAnswering)
    found = model(input_ids=IDS)
    states = model.head(model.model(input_ids=IDS).last_hidden_state)
    expected = states @ model.classifier.weight.T + model.classifier.bias
    assert distance(found.start_logits, expected[..., 0]) < 1e-10
    assert distance(found.end_logits, expected[..., 1]) < 1e-10
