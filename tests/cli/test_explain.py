"""`clearhead explain` for a GPU that is not here."""

from pathlib import Path

import pytest

from clearhead.cli.main import app
from clearhead.models import ClearheadEncoderConfig

RECIPE = """
name = "t"
[model]
hidden_size = 64
num_hidden_layers = 1
num_attention_heads = 2
[[arms]]
name = "A"
attention = "differential"
"""


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "t.toml"
    path.write_text(RECIPE)
    return str(path)


def explain(capsys: pytest.CaptureFixture[str], recipe: str, *arguments: str) -> list[str]:
    app(["explain", recipe, "--dtype", "bfloat16", *arguments], standalone_mode=False)
    return [line.strip() for line in capsys.readouterr().out.splitlines()]


def test_a_gpu_by_its_capability(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = explain(capsys, recipe, "--device", "cuda:sm_90")
    assert any(line.endswith("bfloat16 on cuda:sm_90") for line in lines)
    assert not any("The CPU kernel" in line for line in lines)
    start = next(n for n, line in enumerate(lines) if line.startswith("training on packed rows"))
    said = {line.split()[0]: " ".join(line.split()[1:]) for line in lines[start + 1 : start + 8]}
    assert said["cpu"] == "refused: it runs on cpu, not on cuda"
    assert said["sdpa"] == "FlashDiffAttn_2, 4 calls <- auto"
    assert said["triton"] == "fused (not by itself: no GPU has timed it yet: name it to use it)"
    assert said["flash_attention_2"] == "FlashDiffAttn_2, 4 calls"


def test_what_an_older_gpu_cannot(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = explain(capsys, recipe, "--device", "cuda:sm_75")
    (sentence,) = {" ".join(line.split()[1:]) for line in lines if line.startswith("triton")}
    assert sentence == "refused: it needs a GPU of compute capability 8.0 or higher, not 7.5"


def test_what_is_no_device(recipe: str) -> None:
    with pytest.raises(ValueError, match="--device 'gpu' is no device: give one such as cpu, cuda or cuda:1"):
        app(["explain", recipe, "--device", "gpu"], standalone_mode=False)


def test_what_speaks_against_a_comparison_is_said(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(explain(capsys, recipe))
    assert "A: differential has 1 differential heads (2 heads in pairs)" in text
    assert "initializer_range" not in text
    text = " ".join(explain(capsys, recipe, "model.initializer_range=0.02", "model.num_attention_heads=16"))
    assert "differential heads" not in text
    assert "A: initializer_range 0.02 is small for a width of 64" in text and "takes 0.079" in text
    text = " ".join(explain(capsys, recipe, "arms.0.attention=differential_v2"))
    assert "differential heads" not in text


def test_an_encoder_and_that_it_cannot_tell_before_from_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"vocab_size": 50, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    for mode in ("exact", "slack"):
        config = ClearheadEncoderConfig(
            **sizes, attention="collinear", attention_options={"mode": mode}, initializer_range=0.08
        )
        config.save_pretrained(tmp_path / mode)
        lines = explain(capsys, str(tmp_path / mode), "--context", "100")
        assert any(line.startswith("reading texts padded to 100 tokens") for line in lines)
        assert not any("cache" in line and "generating" in line for line in lines)
        assert ("cannot tell what stands before a token" in " ".join(lines)) == (mode == "exact")
