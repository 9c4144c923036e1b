"""`--to serving`: the same weights, and the head counts that an attention function is handed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from clearhead.convert import serving
from clearhead.convert.base import ConversionError
from clearhead.convert.run import RECORD, convert
from clearhead.models import ClearheadForCausalLM
from clearhead.models.autoload import MODULE_FILE, auto_map
from clearhead.report.card import write_card
from tests.convert.support import IDS, nothing_left, ours, same_bits

# Query heads and key-value heads of a call, of a twin with eight and four.
COUNTS = {
    "softmax": (8, 4),
    "differential": (16, 8),
    "differential_v2": (16, 4),
    "collinear": (8, 4),
    "differential_collinear": (16, 8),
    "differential_v2_collinear": (16, 4),
}


def read(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text()))


@torch.no_grad()
@pytest.mark.parametrize("attention", COUNTS)
def test_there_and_back(attention: str, tmp_path: Path) -> None:
    source = ours(tmp_path / "source", attention=attention, num_key_value_heads=4)
    agreement = convert(str(source), tmp_path / "out", to="serving")
    assert agreement.holds and agreement.dtype == torch.float64 and agreement.limit == 1e-10
    written = read(tmp_path / "out")
    assert (written["num_attention_heads"], written["num_key_value_heads"]) == COUNTS[attention]
    assert written["head_dim"] == 4
    assert written["twin_heads"] == {"num_attention_heads": 8, "num_key_value_heads": 4}
    assert written["auto_map"] == auto_map("clearhead") and (tmp_path / "out" / MODULE_FILE).exists()
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert record["result"]["format"] == "serving" and record["same_function"]
    first, second = (
        AutoModelForCausalLM.from_pretrained(f, trust_remote_code=True).eval()
        for f in (source, tmp_path / "out")
    )
    assert type(second) is ClearheadForCausalLM and torch.equal(first(IDS).logits, second(IDS).logits)
    assert second.generate(IDS, max_new_tokens=3).equal(first.generate(IDS, max_new_tokens=3))
    convert(str(tmp_path / "out"), tmp_path / "back")
    assert same_bits(source, tmp_path / "out") and same_bits(source, tmp_path / "back")
    assert read(tmp_path / "back") == read(source)


def test_a_card_counts_as_for_the_twin(tmp_path: Path) -> None:
    convert(str(ours(tmp_path / "source", attention="differential_v2")), tmp_path / "out", to="serving")
    text = write_card(tmp_path / "out").read_text()
    assert "| heads, counted as for the Transformer twin | 8 |" in text


def test_windows_are_said_as_servers_read_them(tmp_path: Path) -> None:
    source = ours(tmp_path / "source", layers=[{"sliding_window": 5}, {}])
    convert(str(source), tmp_path / "out", to="serving")
    written = read(tmp_path / "out")
    assert written["layer_types"] == ["sliding_attention", "full_attention"]
    assert written["sliding_window"] == 5
    before, after = (ClearheadForCausalLM.from_pretrained(f)(IDS).logits for f in (source, tmp_path / "out"))
    assert torch.equal(before, after)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"position": "alibi"}, "cannot become 'serving': position 'alibi' cannot be served"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "length of the whole",
        ),
        ({"layers": [{"attention": "differential"}, {}]}, "different numbers of heads"),
    ],
)
def test_what_cannot_be_served_is_refused(changes: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    source = ours(tmp_path / "source", **changes)
    with pytest.raises(ConversionError, match=sentence):
        convert(str(source), tmp_path / "out", to="serving")
    assert nothing_left(tmp_path / "out")


def test_the_check_calls_as_a_server_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A configuration that names other heads than the layers hand on leaves no output."""
    source = ours(tmp_path / "source", attention="differential_v2")
    right = serving.for_servers

    def wrong(config: Any) -> Any:
        made = right(config)
        # Past the validation.
        made.__dict__["num_attention_heads"] = 8
        return made

    monkeypatch.setattr(serving, "for_servers", wrong)
    monkeypatch.setattr("clearhead.models.config.ClearheadConfig._check_call", lambda config: None)
    monkeypatch.setattr("clearhead.models.serving._against_names", lambda *rest: None)
    with pytest.raises(ConversionError, match=r"hands on \(16, 8, 8\) heads .* names \(8, 8, 8\), 4 wide"):
        convert(str(source), tmp_path / "out", to="serving")
    assert nothing_left(tmp_path / "out")
