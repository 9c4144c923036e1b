"""The papers' sizes as recipes: counts as the papers' dimensions give, costs of a cluster without one."""

from pathlib import Path

import pytest
import torch

from clearhead.models import ClearheadConfig
from clearhead.models.causal import ClearheadForCausalLM
from clearhead.models.footprint.devices import devices, fleet
from clearhead.models.footprint.memory import footprint
from clearhead.runs.recipe import Recipe
from clearhead.runs.recipe_io import load_recipe
from clearhead.train.optimiser import course

ROOT = Path(__file__).parents[2]
PAPER = ROOT / "recipes" / "paper"
FILES = sorted(PAPER.glob("*.toml"))
# (layers, width, the twin's heads, the arm's width of one head, 12·L·d² + vocabulary · d in 10⁹, rounded as known)
SIZES = {
    "diff-830m": (24, 1536, 16, 96, 0.834),
    "diff-1.4b": (24, 2048, 16, 128, 1.413),
    "diff-2.8b": (32, 2560, 20, 128, 2.773),
    "diff-6.8b": (32, 4096, 32, 128, 6.853),
    "diff-13.1b": (40, 5120, 40, 128, 13.096),
    "diff-3b": (28, 3072, 24, 128, 3.48),
    "diff-3b-64k": (28, 3072, 24, 128, 3.48),
    "coca-350m": (24, 1024, 16, 64, 0.509),
}
# Peak learning rate, warm-up steps, last rate, decay of weights, betas, tokens of a row, tokens in all.
TRAINING = {
    "diff-830m": (1.5e-4, 375, 0.0, 0.05, (0.9, 0.98), 2048, 10e9),
    "diff-1.4b": (1.5e-4, 375, 0.0, 0.05, (0.9, 0.98), 2048, 10e9),
    "diff-2.8b": (1.5e-4, 375, 0.0, 0.05, (0.9, 0.98), 2048, 10e9),
    "diff-6.8b": (7.5e-5, 375, 0.0, 0.05, (0.9, 0.98), 2048, 10e9),
    "diff-13.1b": (7.5e-5, 375, 0.0, 0.05, (0.9, 0.98), 2048, 10e9),
    "diff-3b": (3.2e-4, 1000, 1.28e-5, 0.1, (0.9, 0.95), 4096, 1e12),
    "diff-3b-64k": (8e-5, 18, 1.28e-5, 0.1, (0.9, 0.95), 65536, 1.5e9),
    "coca-350m": (1e-4, 7629, 1e-5, 0.0, (0.9, 0.95), 512, 100e9),
}


def config(recipe: Recipe, name: str) -> ClearheadConfig:
    return ClearheadConfig(vocab_size=recipe.tokenizer.vocab_size, **recipe.model_of(recipe.arm(name)))


def test_every_size_is_there() -> None:
    assert {path.stem for path in FILES} == set(SIZES) == set(TRAINING)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_parameters_are_the_papers(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    layers, width, heads, head, billions = SIZES[path.stem]
    counts = {}
    for arm in recipe.arms:
        made = config(recipe, arm.name)
        with torch.device("meta"):
            model = ClearheadForCausalLM(made)
        counts[arm.name] = sum(p.numel() for p in model.parameters())
        assert (made.num_hidden_layers, made.hidden_size, made.num_attention_heads) == (layers, width, heads)
        assert made.head_dim == head and made.intermediate_size == pytest.approx(8 / 3 * width, rel=2e-3)
    # Projections 4d², FFN 3·d·f, two norms a layer and one more, the embedding once if it is shared.
    inner = made.intermediate_size or 0
    embeddings = made.vocab_size * width * (1 if made.tie_word_embeddings else 2)
    exact = layers * (4 * width**2 + 3 * width * inner + 2 * width) + width + embeddings
    own = {"differential": layers * 6 * head}
    for arm in recipe.arms:
        assert counts[arm.name] == exact + own.get(arm.attention, 0)
        assert counts[arm.name] / 1e9 == pytest.approx(billions, rel=1e-3)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_schedules_are_the_papers(path: Path) -> None:
    train, data = load_recipe(path).train, load_recipe(path).data
    rate, warmup, last, decay, betas, length, tokens = TRAINING[path.stem]
    factor = course(train)
    assert train.learning_rate * factor(warmup - 1) == pytest.approx(rate)
    assert factor(warmup - 2) < 1 and factor(warmup + 1) < 1
    assert train.learning_rate * factor(train.steps) == pytest.approx(last, abs=1e-12)
    assert (train.weight_decay, train.betas, data.length, train.tokens) == (decay, betas, length, tokens)
    # A node of eight, and two of them, share a step evenly.
    assert train.batch_tokens // length % 16 == 0


def test_the_long_stage_has_its_base() -> None:
    long, main = (config(load_recipe(PAPER / f"{name}.toml"), "DIFF") for name in ("diff-3b-64k", "diff-3b"))
    assert (long.rope_parameters or {})["rope_theta"] == 640_000.0
    assert (main.rope_parameters or {}).get("rope_theta", 10_000.0) == 10_000.0


def test_what_the_largest_takes_of_a_node() -> None:
    made = config(load_recipe(PAPER / "diff-13.1b.toml"), "DIFF")
    found = footprint(made, fleet("8xh100"), length=2048, batch_tokens=262_144)
    memory, time = found.plain
    parameters = found.size.parameters
    assert memory.weights == memory.gradients == 4 * parameters // 8
    assert memory.optimiser == 8 * parameters // 8
    checkpointed, slower = found.checkpointed
    assert checkpointed.activations < memory.activations / 8
    # Six FLOPs a parameter and token at least, eight where the forward pass is done twice.
    least = 6 * (parameters - made.vocab_size * made.hidden_size) * 262_144 / (8 * 989e12)
    assert least < time.compute < 1.25 * least and slower.compute == pytest.approx(time.compute * 4 / 3)
    alone = footprint(made, fleet("h100"), length=2048, batch_tokens=262_144, sharding="none")
    assert alone.plain[0].peak > 80e9 and alone.plain[1].wire == 0.0
    with pytest.raises(ValueError, match="has not 1 rows of 2,048 tokens for each of 256 devices"):
        footprint(made, fleet("256xh100"), length=2048, batch_tokens=262_144)


def test_devices() -> None:
    assert fleet("8xH100") == fleet("8 x h100") and fleet("h100").count == 1
    assert fleet("16xh100").wire == 50e9 and fleet("8xh100").wire == 450e9
    for name, device in devices().items():
        assert device.flops > device.float32 and device.bandwidth > device.link >= device.network, name
    with pytest.raises(ValueError, match="unknown device 'h1000'; did you mean 'h100'"):
        fleet("8xh1000")
    with pytest.raises(ValueError, match="is no number of devices"):
        fleet("many gpus")
    with pytest.raises(ValueError, match="is no number of devices"):
        fleet("0xh100")
