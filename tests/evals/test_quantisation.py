"""Rounding by hand, quantised attention against numpy, and quality against bits on tiny models."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from clearhead.evals.asking.running import inference
from clearhead.evals.internals.quantisation import Quantisation, QuantisationConfig, losses
from clearhead.evals.probing.rounding import Scheme, absmax, quantised
from tests.evals import tiny
from tests.evals.test_activation_outliers import rotated, run_of

N = 20


def rounded(x: np.ndarray, bits: int, among: np.ndarray | None = None) -> np.ndarray:
    """All of x with one step, made from the values ``among``."""
    step = np.abs(x if among is None else x[among]).max() / (2 ** (bits - 1) - 1)
    return np.rint(x / step) * step


def test_absmax_by_hand() -> None:
    x = torch.tensor([[0.0, 1.0, -7.0, 3.4, 0.49], [0.0, 0.0, 0.0, 0.0, 0.0]])
    # 4 bits hold −7 … 7, so the step of the first row is 1.
    assert absmax(x, 4, (-1,)).tolist() == [[0, 1, -7, 3, 0], [0, 0, 0, 0, 0]]
    assert absmax(x, 2, (0, 1)).tolist()[0] == [0, 0, -7, 0, 0]
    seen = torch.tensor([[True, True, False, True, True]] * 2)
    found = absmax(x, 3, (-1,), seen)
    np.testing.assert_allclose(found[0], [0, 3.4 / 3, -3.4, 3.4, 0], rtol=1e-6)
    assert absmax(x.bfloat16(), 8, (-1,)).dtype == torch.bfloat16
    many = torch.from_numpy(np.random.default_rng(0).normal(size=1000))
    for bits in range(2, 17):
        one = absmax(many, bits, (0,))
        assert len(one.unique()) <= 2**bits - 1
        assert (one - many).abs().max() <= many.abs().max() / (2 ** (bits - 1) - 1) / 2 * (1 + 1e-9)
    for bits in (1, 17):
        with pytest.raises(ValueError, match=f"bits must be 2 to 16, not {bits}"):
            absmax(x, bits, (-1,))


def maps_by_hand(model: Any, ids: list[int], scheme: Scheme) -> list[np.ndarray]:
    """The first layer's map of every query head of the projections."""
    layer, seen = model.model.layers[0], np.tril(np.ones((len(ids), len(ids)), dtype=bool))
    with torch.no_grad():
        x = layer.input_layernorm(model.model.embed_tokens(torch.tensor(ids)))
        q = layer.self_attn.q_proj(x).numpy().reshape(len(ids), -1, 8)
        k = layer.self_attn.k_proj(x).numpy().reshape(len(ids), -1, 8)
    keys = [rotated(k[:, g]) for g in range(k.shape[1])]
    if scheme.cache:
        keys = [np.stack([rounded(row, scheme.cache) for row in key]) for key in keys]
    repeats = q.shape[1] // len(keys)
    logits = [rotated(q[:, h]) @ keys[h // repeats].T / math.sqrt(8) for h in range(q.shape[1])]
    if scheme.logits:
        streams = 2 if "differential" in getattr(model.config, "attention", "") else 1
        groups = [[h] for h in range(len(logits))]
        if scheme.per == "tensor":
            groups = [list(range(s, len(logits), streams)) for s in range(streams)]
        for group in groups:
            both = rounded(np.stack([logits[h] for h in group]), scheme.logits, np.stack([seen] * len(group)))
            for place, h in enumerate(group):
                logits[h] = both[place]
    found = []
    for one in logits:
        weights = np.where(seen, np.exp(np.where(seen, one, -np.inf) - one.max()), 0)
        found.append(weights / weights.sum(-1, keepdims=True))
    return found


SCHEMES = [
    Scheme(),
    Scheme(logits=16),
    Scheme(logits=4),
    Scheme(logits=3, per="head"),
    Scheme(cache=4),
    Scheme(logits=4, cache=4),
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("kind", ["llama", "softmax", "differential", "differential_v2"])
def test_quantised_maps_are_those_by_hand(kind: str, scheme: Scheme) -> None:
    model = (tiny.llama() if kind == "llama" else tiny.ours(attention=kind)).double()
    before = model.config._attn_implementation
    texts = np.random.default_rng(0).integers(3, 320, (2, N))
    ids = torch.from_numpy(texts)
    with inference(model), quantised(model, scheme):
        maps = model(input_ids=ids, use_cache=False, output_attentions=True).attentions[0].numpy()
        gate = None
        if "differential" in kind:
            layer = model.model.layers[0]
            gate = layer.self_attn.variant.gate(layer.input_layernorm(model.model.embed_tokens(ids))).numpy()
    assert model.config._attn_implementation == before
    for row, text in enumerate(texts.tolist()):
        truth = np.stack(maps_by_hand(model, text, scheme))
        if gate is not None:
            share = gate[row if len(gate) > 1 else 0]
            truth = truth[0::2] - share * truth[1::2]
        np.testing.assert_allclose(maps[row], truth, atol=1e-7)


def test_values_are_rounded_by_token_and_head() -> None:
    model, ids = tiny.llama().double(), torch.arange(3, 3 + N)[None]
    layer, heard = model.model.layers[0].self_attn, []
    handle = layer.o_proj.register_forward_pre_hook(lambda module, inputs: heard.append(inputs[0]))
    with inference(model), quantised(model, Scheme(cache=3)):
        model(input_ids=ids, use_cache=False)
    handle.remove()
    with torch.no_grad():
        x = model.model.layers[0].input_layernorm(model.model.embed_tokens(ids[0]))
        v = layer.v_proj(x).numpy().reshape(N, 2, 8)
    values = np.stack([[rounded(v[n, g], 3) for g in range(2)] for n in range(N)])
    maps = maps_by_hand(model, ids[0].tolist(), Scheme(cache=3))
    truth = np.concatenate([maps[h] @ values[:, h // 2] for h in range(4)], axis=1)
    np.testing.assert_allclose(heard[0][0].numpy(), truth, atol=1e-7)


@pytest.mark.parametrize("position", ["alibi", "nope"])
def test_unquantised_is_the_model_itself_and_bits_bring_it_back(position: str) -> None:
    model = tiny.ours(attention="differential", position=position).double()
    ids = torch.from_numpy(np.random.default_rng(0).integers(3, 320, (2, N)))
    with inference(model):
        plain = model(input_ids=ids, use_cache=False).logits
        errors = []
        for scheme in (Scheme(), *(Scheme(logits=bits) for bits in (16, 8, 4))):
            with quantised(model, scheme):
                errors.append(float((model(input_ids=ids, use_cache=False).logits - plain).abs().max()))
    assert errors[0] < 1e-12 < errors[1] < errors[2] < errors[3]


def test_weights_are_rounded_by_channel_and_put_back_bit_by_bit() -> None:
    model = tiny.llama(tie_word_embeddings=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for group in (None, 8):
        with quantised(model, Scheme(weights=4, group=group)):
            for name, value in model.state_dict().items():
                old = before[name].double().numpy()
                if old.ndim == 2 and "embed" not in name and "lm_head" not in name:
                    size = group or old.shape[1]
                    rows = old.reshape(-1, size)
                    truth = np.stack([rounded(row, 4) for row in rows]).reshape(old.shape)
                    # A value in the middle of a step goes either way in float32.
                    off = np.abs(value.numpy() - truth) > 1e-6
                    assert off.mean() < 1e-3, name
                else:
                    assert torch.equal(value, before[name]), name
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(RuntimeError, match="stop"), quantised(model, Scheme(weights=2)):
        raise RuntimeError("stop")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="group is 7"), quantised(model, Scheme(weights=4, group=7)):
        pass
    with (
        pytest.raises(ValueError, match=r"no nn\.Linear layers"),
        quantised(tiny.gpt2(), Scheme(weights=4)),
    ):
        pass


SMALL = QuantisationConfig(length=64, documents=4, samples=3, logits=[16, 3], weights=[3], cache=[3])


@pytest.mark.parametrize("make", [tiny.llama, lambda: tiny.ours(attention="differential")], ids=["hf", "v1"])
def test_quality_against_bits_and_its_report(make: Any) -> None:
    model, documents = make(), tiny.store([70] * 5)
    subject = tiny.subject(model, documents)
    values = Quantisation().run(subject, SMALL)
    assert [(cell["target"], cell["bits"]) for cell in values["cells"]] == [
        ("none", None),
        ("logits", 16),
        ("logits", 3),
        ("weights", 3),
        ("cache", 3),
    ]
    rows = np.array([[1, *documents.document(i).tolist()[:63]] for i in map(int, values["documents"])])
    # A sum of 63 losses in float32, each of about 6 nats.
    np.testing.assert_allclose(values["cells"][0]["nats"], losses(subject, rows, 64), atol=2e-3)
    apart = [abs(np.subtract(c["nats"], values["cells"][0]["nats"])).max() for c in values["cells"]]
    assert apart[1] < 0.05 and min(apart[2:]) > 0.05
    sizes = [len(tiny.tokenizer().decode(row[1:].tolist()).encode()) for row in rows]
    assert values["bytes"] == sizes and values["needles"] == 3
    # One text at a time: a step belongs to its own text.
    single = Quantisation().run(subject, SMALL.model_copy(update={"batch_tokens": 1}))
    for ours, theirs in zip(values["cells"], single["cells"], strict=True):
        if ours["bits"] in (None, 16):
            np.testing.assert_allclose(ours["nats"], theirs["nats"], atol=2e-3)
    section = Quantisation().section(run_of({"a": values, "b": values}, "quantisation"))
    assert (
        "attention logits at 3 bits" in section.answer and "No difference from a detected" in section.answer
    )
    table = section.tables[0].rows
    assert table[0][0] == "a, not quantised" and len(table) == 10 and "detected" in str(table[1][4])
    assert {chart.slug for chart in section.charts} >= {
        "quantisation-logits-loss",
        "quantisation-logits-needles",
    }


def test_a_text_is_rounded_by_its_own_step_alone() -> None:
    model = tiny.llama().double()
    ids = torch.from_numpy(np.random.default_rng(1).integers(3, 320, (3, N)))
    with inference(model), quantised(model, Scheme(logits=4)):
        together = model(input_ids=ids, use_cache=False).logits
        apart = torch.cat([model(input_ids=row[None], use_cache=False).logits for row in ids])
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-10)


def test_what_cannot_be_quantised_is_named() -> None:
    subject = tiny.subject(tiny.llama(), tiny.store([70] * 4))
    nothing = QuantisationConfig(length=64, logits=[], weights=[], cache=[])
    assert "nothing is to be quantised" in Quantisation().run(subject, nothing)["skipped"]
    with pytest.raises(ValueError, match="less than or equal to 16"):
        QuantisationConfig(logits=[32])
    short = Quantisation().run(tiny.subject(tiny.llama(), tiny.store([70] * 3)), SMALL)
    assert "only 3 documents have 64 tokens" in short["skipped"]
    bad = Quantisation().run(subject, SMALL.model_copy(update={"group": 7}))
    assert "group is 7" in bad["skipped_cells"]["weights, 3 bits"] and len(bad["cells"]) == 4
    alone = QuantisationConfig(length=64, logits=[], weights=[4], cache=[], group=7)
    assert "group is 7" in Quantisation().run(subject, alone)["skipped"]
    words = tiny.tokenizer()
    words.bos_token = None
    found = Quantisation().run(tiny.subject(tiny.llama(), tiny.store([70] * 4), tokenizer=words), SMALL)
    assert "no bos token" in found["skipped_cells"]["needles"] and found["needles"] == 0
    section = Quantisation().section(run_of({"a": found}, "quantisation"))
    assert section.tables[0].rows[1][3] is None, "what was not asked is shown as missing"
    capped = Gemma2Config(vocab_size=320, num_key_value_heads=2, head_dim=8, **tiny.SIZES)
    refused = Quantisation().run(tiny.subject(Gemma2ForCausalLM(capped).eval(), tiny.store([70] * 4)), SMALL)
    assert "caps its logits" in refused["skipped"]
    outside = tiny.CopyModel(tiny.CopyConfig()).eval()
    assert (
        "attention interface"
        in Quantisation().run(tiny.subject(outside, tiny.store([70] * 4)), SMALL)["skipped"]
    )
