"""`clearhead.show`: the page of `clearhead look` as a value."""

from pathlib import Path

import pytest

import clearhead
from tests.look import small


def test_a_loaded_model_is_shown_and_saved(tmp_path: Path) -> None:
    model, twin = small.model("differential"), small.model("softmax")
    shown = clearhead.show(model, small.TEXT, tokenizer=small.tokenizer(), against=twin, marks=["fox"])
    assert len(shown.views) == 2 and shown.views[0].marks[1].name == "fox"
    assert shown.save(tmp_path / "page.html").read_text() == shown.html
    framed = shown._repr_html_()
    assert framed.startswith("<iframe srcdoc=") and framed.count("<iframe") == 1 and "&lt;script" in framed
    assert "differential" in repr(shown) and "html" not in repr(shown)


def test_without_a_tokenizer_it_says_what_is_missing() -> None:
    with pytest.raises(ValueError, match="a loaded ClearheadForCausalLM needs tokenizer="):
        clearhead.show(small.model("softmax"), small.TEXT)
