"""The examples do what they say: the written-out model is the library's, adapters are learned, results are in hand."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from clearhead.models import ClearheadConfig, ClearheadForCausalLM
from tests.evals import tiny

EXAMPLES = Path(__file__).parents[2] / "examples"
TEXT = "The grass is green and the sky is blue; what is hidden here? A passkey, 0123456789. " * 40


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("attention", ["softmax", "differential", "differential_v2", "collinear"])
def test_the_written_out_model_is_the_library_s(attention: str) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = ClearheadConfig(
        vocab_size=256, attention=attention, tie_word_embeddings=True, initializer_range=0.2, **sizes
    )
    model = ClearheadForCausalLM(config).eval()
    nano = load("nano").Nano(attention, 32, 2, 4, inner=48)
    weights = {name.removeprefix("model."): weight for name, weight in model.state_dict().items()}
    weights.pop("lm_head.weight", None)
    nano.load_state_dict(weights)
    ids = torch.randint(256, (2, 40))
    with torch.no_grad():
        found, expected = nano(ids), model(ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_the_written_out_model_learns(capsys: pytest.CaptureFixture[str]) -> None:
    nano = load("nano")
    torch.manual_seed(0)
    model = nano.Nano("differential", 32, 1, 4)
    text = torch.frombuffer(bytearray(TEXT.encode()), dtype=torch.uint8).long()
    loss = nano.train(model, text, 50, rows=4, length=32)
    assert loss < 4 < 8  # Bits per byte; a blind guess has 8.
    assert "step 50: " in capsys.readouterr().out
    assert model.write(text[None, :8], 5).shape == (1, 13)


@pytest.mark.parametrize("name", ["nano", "vision_transformer"])
def test_it_stays_short(name: str) -> None:
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= 150


def test_patches_are_read_row_by_row() -> None:
    model = load("vision_transformer").VisionTransformer("softmax", width=16, layers=1, heads=2)
    seen = []
    model.embed.register_forward_hook(lambda module, given, out: seen.append(given[0]))
    image = torch.arange(64.0).view(1, 8, 8)
    model(image)
    assert seen[0].shape == (1, 16, 4)
    assert seen[0][0, 5].tolist() == [18.0, 19.0, 26.0, 27.0]


@pytest.mark.parametrize("variant", ["differential", "differential_v2", "collinear"])
def test_the_vision_transformer_learns_digits(variant: str) -> None:
    pytest.importorskip("sklearn")
    vision = load("vision_transformer")
    images, labels = vision.load_digits()
    assert images.shape == (1797, 8, 8) and float(images.max()) == 1.0
    one, other = vision.split(1797, 3)
    assert len(other) == 359 and len({*one.tolist(), *other.tolist()}) == 1797
    sizes = {"width": 32, "layers": 1, "heads": 4}
    some, their = images[:200], labels[:200]
    once, twice = (vision.train(variant, 0, some, their, 1, 3e-3, **sizes) for _ in range(2))
    assert once == twice
    # A blind guess is right for a tenth.
    assert vision.train(variant, 0, images, labels, 6, 5e-3, **sizes) > 0.5


def test_twins_are_compared_seed_by_seed() -> None:
    vision = load("vision_transformer")
    line = vision.summary("differential", [0.9, 0.8], [0.8, 0.6], 359)
    assert "85.00 %  (n = 359 test images a seed, 2 seeds)  +15.00 ± 5.00 points" in line
    assert "points" not in vision.summary("softmax", found := [0.8, 0.6], found, 359)


def test_adapters_are_learned(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from peft import PeftModel

    tiny.ours(attention="differential", max_position_embeddings=64).save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    load("lora").fine_tune(str(tmp_path / "base"), TEXT, tmp_path / "out", rank=2, steps=3, length=16)
    base = tiny.ours(attention="differential", max_position_embeddings=64)
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "out"))
    learned = [weight for name, weight in adapted.named_parameters() if "lora_B" in name]
    assert len(learned) == 8 and all(float(weight.abs().max()) > 0 for weight in learned)


def test_results_are_in_hand(tmp_path: Path) -> None:
    tiny.llama(max_position_embeddings=512).save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "text.txt").write_text(TEXT * 4)
    found = load("evaluate_a_model").evaluate(
        str(tmp_path / "base"), str(tmp_path / "text.txt"), tmp_path / "run", samples=2
    )
    assert set(found) == {"passkey", "perplexity"}
    assert (tmp_path / "run" / "report.html").exists()


def test_the_notebook_runs() -> None:
    cells = json.loads((EXAMPLES / "look.ipynb").read_text())["cells"]
    names: dict[str, object] = {}
    shown = []
    for cell in cells:
        if cell["cell_type"] != "code":
            continue
        *lines, last = "".join(cell["source"]).splitlines()
        source = "".join(cell["source"])
        if last.startswith("clearhead.show("):
            exec("\n".join(lines), names)
            shown.append(eval(last, names))
        else:
            exec(source, names)
        assert cell["outputs"] == []
    (page,) = shown
    assert "<iframe" in page._repr_html_() and "mat" in page.html
