"""The one contract of vLLM, SGLang and continuous batching, with a stand-in for the server."""

import ast
import importlib.util
import inspect
import sys
import textwrap
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import clearhead.models
from clearhead.convert.run import convert
from clearhead.models import ClearheadModel
from clearhead.models.blocks import ClearheadAttention
from clearhead.models.serving import for_people, for_servers
from tests.contracts.model_cases import VARIANTS, make_config, make_model, tokens
from tests.contracts.support import distance
from tests.load.paged_server import NAME, Server, registered

ROOT = Path(__file__).parents[2]
NEW = 6


def prompts(count: int = 20) -> list[list[int]]:
    """Of 3 to 25 tokens."""
    return [tokens(1, 3 + 7 * i % 23, seed=i)[0].tolist() for i in range(count)]


def generated(model: Any, asked: list[list[int]], new: int = NEW) -> list[list[int]]:
    found = []
    for prompt in asked:
        ids = torch.tensor([prompt])
        found.append(model.generate(ids, max_new_tokens=new, do_sample=False)[0, len(prompt) :].tolist())
    # Otherwise a server that loses requests' texts would pass.
    assert len({tuple(made) for made in found}) > len(found) // 2
    return found


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in VARIANTS},
    "mqa": ("differential_v2", {"num_key_value_heads": 1}),
    "windows": ("differential_v2_collinear", {"layers": [{"sliding_window": 5}, {}]}),
    "V1_window": ("differential", {"sliding_window": 5}),
    "mixed": ("softmax", {"layers": [{"attention": "collinear"}, {}]}),
    "xpos": ("softmax", {"position": "xpos"}),
    "nope": ("differential_v2", {"nope_interval": 2}),
    "yarn": ("collinear", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}),
    "compact": ("collinear", {"compact_cache": True}),
}
# The others differ from these in what a few requests show.
WHOLE = ("softmax", "differential", "differential_v2", "collinear", "differential_v2_collinear", "windows")


@pytest.mark.parametrize("case", CASES)
def test_a_server_makes_the_tokens_of_generate(case: str) -> None:
    """Twenty requests, laid side by side and in pieces; every layer is called once a step, with its own index."""
    name, changes = CASES[case]
    model = make_model(name, dtype=torch.float64, max_position_embeddings=128, **changes)
    asked = prompts(20 if case in WHOLE else 6)
    expected = generated(model, asked)
    with registered():
        server = Server(for_servers(model.config), dict(model.state_dict()), pages=160)
        assert server.generate(asked, NEW) == expected
    assert {own.calls for own in server.instances.values()} == {server.steps}
    # Prompts of 17 tokens and more came in pieces, beside others that were decoding.
    assert server.steps > NEW


def test_a_converted_directory_is_served(tmp_path: Path) -> None:
    model = make_model("differential_v2", dtype=torch.float64)
    model.save_pretrained(tmp_path / "model")
    convert(str(tmp_path / "model"), tmp_path / "served", to="serving")
    config = AutoConfig.from_pretrained(tmp_path / "served", trust_remote_code=True)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (16, 4, 4)
    assert "AutoModel" in config.auto_map and ClearheadModel.is_backend_compatible()
    with registered():
        served = Server(config, dict(model.state_dict()))
        assert served.generate(prompts(8), NEW) == generated(model, prompts(8))


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "alibi": ("softmax", {"position": "alibi"}, r"position 'alibi' cannot be served: it adds a bias"),
    "dynamic": (
        "softmax",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        "by the length of the whole request",
    ),
    "heads": ("softmax", {"layers": [{"attention": "differential_v2"}, {}]}, "different numbers of heads"),
    "windows": ("softmax", {"layers": [{"sliding_window": 4}, {"sliding_window": 5}]}, "different sizes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_server_cannot_be_told_is_refused(case: str) -> None:
    name, changes, sentence = REFUSED[case]
    config = make_config(name, **changes)
    with pytest.raises(ValueError, match=sentence):
        for_servers(config)
    with pytest.raises(ValueError, match=sentence):
        make_model(name, **changes).generate_batch([[5, 6]])


@pytest.mark.parametrize("name", ["differential", "differential_v2"])
def test_head_counts_of_the_twin_are_refused_before_anything_is_loaded(name: str) -> None:
    """A server would make caches of the wrong size. Layers with a window it would not know of are refused too."""
    sentence = (
        rf"attention '{name}' hands a server 16 .* where the configuration names 8 and 4: .* --to serving"
    )
    with registered():
        config = make_config(name)
        config._attn_implementation = NAME
        with pytest.raises(ValueError, match=sentence), torch.device("meta"):
            ClearheadModel(config)
        windows = make_config("softmax", layers=[{"sliding_window": 4}, {}])
        windows._attn_implementation = NAME
        with pytest.raises(ValueError, match="not told which layers have a window"):
            ClearheadModel(windows)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_configuration_for_servers_is_the_same_model(name: str) -> None:
    config = make_config(name)
    served = for_servers(config)
    assert (
        for_people(served).to_dict() == config.to_dict() and for_servers(served).to_dict() == served.to_dict()
    )
    model, again = make_model(name), ClearheadModel(served).eval()
    again.load_state_dict(model.model.state_dict())
    ids = tokens(2, 7)
    assert torch.equal(again(ids)[0], model.model(ids)[0])
    # Caches of this library still hold what the layers write.
    assert torch.equal(again(ids, use_cache=True)[0], model.model(ids)[0])


def test_twin_heads_that_do_not_fit_are_refused() -> None:
    for heads, sentence in (
        ({"num_attention_heads": 8, "num_key_value_heads": 4}, r"makes \(16, 4\) of it"),
        ({"num_attention_heads": 8}, "must be a table of"),
        ({"num_attention_heads": 8, "num_key_value_heads": 0}, "positive integers"),
    ):
        with pytest.raises(StrictDataclassError, match=sentence):
            make_config("differential_v2", twin_heads=heads)


def one_request(module: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **kwargs: Any) -> Any:
    """A server's function that knows one request, from its first token on."""
    out = F.scaled_dot_product_attention(
        query, key, value, scale=kwargs["scaling"], is_causal=True, enable_gqa=True
    )
    return out[0].transpose(0, 1).flatten(1), None


class Plain:
    """`one_request`, and what it was handed."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        self.seen.append((module, query.shape[1], key.shape[1], kwargs))
        found: tuple[Tensor, None] = one_request(module, query, key, value, **kwargs)
        return found


@pytest.fixture
def plain() -> Any:
    made = Plain()
    AttentionInterface.register(NAME, made)
    yield made
    del AttentionInterface._global_mapping[NAME]


def served(name: str, **changes: Any) -> ClearheadModel:
    model = make_model(name, **changes)
    config = for_servers(model.config)
    config._attn_implementation = NAME
    made = ClearheadModel(config).eval()
    made.load_state_dict(model.model.state_dict())
    return made


def ask(model: Any, ids: Tensor, **more: Any) -> Any:
    where = torch.arange(ids.shape[1])[None]
    return model(ids, use_cache=False, position_ids=where, attention_instances={}, return_dict=False, **more)


@torch.no_grad()
@pytest.mark.parametrize("name", ["softmax", "differential", "differential_v2"])
def test_a_function_is_handed_the_layer_and_every_keyword(name: str, plain: Plain) -> None:
    model, ids = served(name, sliding_window=9), tokens(1, 7)
    found = ask(model, ids, forward_batch="as it came")
    assert isinstance(found, tuple) and distance(found[0], make_model(name).model(ids)[0]) < 1e-5
    assert [module.layer_idx for module, *_ in plain.seen] == [0, 1]
    for layer, (module, queries, keys, kwargs) in enumerate(plain.seen):
        config = model.config
        assert module is model.layers[layer].self_attn and module.config is config
        assert (queries, keys) == (config.num_attention_heads, config.num_key_value_heads)
        assert module.num_key_value_groups == queries // keys and module.is_causal is True
        assert module.scaling == kwargs["scaling"] == config.head_dim**-0.5
        assert module.sliding_window == kwargs["sliding_window"] == 9
        assert kwargs["forward_batch"] == "as it came" and kwargs["position_ids"].shape == (1, 7)


def test_what_a_server_does_not_hand_is_refused(plain: Plain) -> None:
    model, ids = served("softmax"), tokens(1, 4)
    for more, sentence in (
        ({"attention_mask": torch.ones(1, 4)}, "would not see the padding"),
        ({"past_key_values": DynamicCache()}, "past_key_values beside a server's"),
        ({"rope_length": 9}, "rope_length beside a server's"),
        ({"output_attentions": True}, "no maps"),
    ):
        with pytest.raises(ValueError, match=sentence):
            ask(model, ids, **more)
    with pytest.raises(ValueError, match="must give position_ids"):
        model(ids, attention_instances={})
    # Without state of a server's, nothing says who keeps padding and documents apart.
    with pytest.raises(ValueError, match="no mask function"):
        model(ids)
    with pytest.raises(TypeError, match="no argument 'attention_instances'"):
        make_model("softmax")(ids, attention_instances={})
    assert plain.seen == []


@torch.no_grad()
def test_a_served_pass_is_one_compiled_graph(plain: Plain) -> None:
    """As vLLM compiles it: the decoder's forward pass, rows of any length."""
    AttentionInterface.register(NAME, one_request)
    torch._dynamo.reset()
    model = served("differential_v2_collinear")
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for length in (7, 9):
        ids = tokens(1, length)
        assert distance(ask(compiled, ids)[0], ask(model, ids)[0]) < 1e-5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1


@torch.no_grad()
def test_layers_of_other_ranks_hand_on_what_they_get(plain: Plain) -> None:
    """vLLM's pipeline parallelism puts modules in their place that return their first argument."""

    class Elsewhere(torch.nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return args[0]

    model, ids = served("softmax"), tokens(1, 5)
    model.layers[0] = Elsewhere()
    ask(model, ids)
    assert [module.layer_idx for module, *_ in plain.seen] == [1]


def test_vllm_finds_the_call_in_the_source() -> None:
    """It reads `forward` for one call of a local name looked up there, and for its scale."""
    (function,) = ast.parse(textwrap.dedent(inspect.getsource(ClearheadAttention.forward))).body
    looked_up = {
        target.id
        for node in ast.walk(function)
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Call)
        and ast.unparse(node.value.func) == "ALL_ATTENTION_FUNCTIONS.get_interface"
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    (call,) = (
        node
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in looked_up
    )
    assert ast.unparse(call.args[0]) == "self"
    assert [ast.unparse(word.value) for word in call.keywords if word.arg == "scaling"] == ["self.scaling"]


@pytest.mark.parametrize("name", ["softmax", "differential"])
def test_functions_with_a_mask_function_get_the_layers_index_too(name: str) -> None:
    seen = []

    def probe(module: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append((module.layer_idx, module.scaling, module.sliding_window))
        return sdpa_attention_forward(module, *args, **kwargs)

    AttentionInterface.register("probe", probe)
    AttentionMaskInterface.register("probe", sdpa_mask)
    try:
        model, ids = make_model(name, sliding_window=5), tokens(1, 7)
        expected = model(ids).logits
        model.set_attn_implementation("probe")
        assert distance(model(ids).logits, expected) < 1e-4
    finally:
        del AttentionInterface._global_mapping["probe"], AttentionMaskInterface._global_mapping["probe"]
    calls = len(seen) // 2
    assert [layer for layer, *_ in seen] == [0] * calls + [1] * calls
    assert {tuple(rest) for _, *rest in seen} == {(0.5, 5)}


def test_the_plug_in_of_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    module, _, function = declared["vllm.general_plugins"]["clearhead"].partition(":")
    monkeypatch.delitem(sys.modules, module, raising=False)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "vllm" else found(name))
    with pytest.raises(ImportError, match=r"^clearhead.vllm_plugin is for vLLM, which is not installed"):
        importlib.import_module(module)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: found("json") if name == "vllm" else found(name)
    )
    register = getattr(importlib.import_module(module), function)
    register()
    import transformers

    assert transformers.ClearheadForCausalLM is clearhead.models.ClearheadForCausalLM
