"""Heads for classes of texts, of tokens, and for answers: they learn, and read the tokens that they should."""

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from clearhead.models import (
    ClearheadForQuestionAnswering,
    ClearheadForSequenceClassification,
    ClearheadForTokenClassification,
)
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
each_head = pytest.mark.parametrize("head", LABELS)


@each_head
@pytest.mark.parametrize("name", ["softmax", "differential", "differential_v2_collinear"])
def test_a_head_learns_and_its_gradient_reaches_all(head: Any, name: str) -> None:
    torch.manual_seed(0)
    model = head(make_config(name, num_labels=3))
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for _ in range(25):
        loss = model(input_ids=IDS, **LABELS[head]).loss
        optimizer.zero_grad()
        loss.backward()
        losses.append(float(loss.detach()))
        if len(losses) == 1:
            without = [n for n, p in model.named_parameters() if p.grad is None or not bool(p.grad.any())]
            assert without == []
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
def test_a_head_takes_the_decoder_of_a_language_model_and_gives_it_back(head: Any, tmp_path: Any) -> None:
    language = make_model("differential", num_labels=3)
    language.save_pretrained(tmp_path / "language")
    auto = {
        ClearheadForSequenceClassification: AutoModelForSequenceClassification,
        ClearheadForTokenClassification: AutoModelForTokenClassification,
        ClearheadForQuestionAnswering: AutoModelForQuestionAnswering,
    }[head]
    model = auto.from_pretrained(tmp_path / "language")
    assert type(model) is head
    model.save_pretrained(tmp_path / "head")
    again = auto.from_pretrained(tmp_path / "head")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "head")
    assert torch.equal(back.model.layers[1].mlp.up_proj.weight, language.model.layers[1].mlp.up_proj.weight)


@torch.no_grad()
def test_an_answer_is_where_its_logits_say() -> None:
    model = ClearheadForQuestionAnswering(make_config("differential")).double().eval()
    found = model(input_ids=IDS)
    states = model.model(input_ids=IDS).last_hidden_state
    expected = states @ model.qa_outputs.weight.T + model.qa_outputs.bias
    assert distance(found.start_logits, expected[..., 0]) < 1e-10
    assert distance(found.end_logits, expected[..., 1]) < 1e-10
