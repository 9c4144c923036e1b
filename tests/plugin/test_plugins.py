"""A variant, position, rope scaling, engine, kernel, evaluation and converter: each is one new file, one registry line.

For each the package is copied, exactly that is added to the copy, and the newcomer is used from a process of its own
wherever a built-in one can be used. If something else had to change for it, the process fails.
"""

import difflib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tests.plugin import pages

SOURCE = Path(__file__).parents[2] / "src" / "clearhead"

MODEL = """
import torch
from clearhead.models import ClearheadConfig, ClearheadForCausalLM
from clearhead.registry import VARIANTS

def build(**choices):
    torch.manual_seed(0)
    sizes = dict(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    return ClearheadForCausalLM(ClearheadConfig(**sizes, **choices))

ids = torch.randint(1, 50, (2, 9), generator=torch.Generator().manual_seed(0))

def check(model):
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    cached = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    plain = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0, use_cache=False)
    assert torch.equal(cached, plain)
"""


@dataclass(frozen=True)
class Plugin:
    """The new file, its line in the registry, and a program that uses it by its name."""

    table: str
    file: str
    target: str
    text: str
    use: str
    name: str = "toy"


VARIANT = Plugin(
    "VARIANTS",
    "variants/toy.py",
    "clearhead.variants.toy:Toy",
    """
from torch import Tensor
from clearhead.core.streams import HeadShape
from clearhead.variants.softmax import Softmax

class Toy(Softmax):
    def __init__(self, shape: HeadShape, *, factor: float = 1.0) -> None:
        super().__init__(shape)
        self.factor = factor

    def finish(self, o: Tensor) -> Tensor:
        return o * self.factor
""",
    MODEL
    + """
check(build(attention="toy", attention_options={"factor": 0.5}))
same, half = build(attention="toy"), build(attention="toy", attention_options={"factor": 0.5})
assert torch.equal(build()(ids).logits, same(ids).logits)
assert not torch.equal(half(ids).logits, same(ids).logits)
from clearhead.train.comparison import check_models
from clearhead.runs.recipe_io import parse_recipe
arm = {"name": "Toy", "attention": "toy", "attention_options": {"factor": 0.5}}
recipe = parse_recipe({"name": "t", "arms": [arm]}, source="test")
assert check_models(recipe)["Toy"] > 0
from clearhead.models.cost import forward_flops_per_token, kv_bytes_per_token
assert forward_flops_per_token(half.config, 8) > 0 and kv_bytes_per_token(half.config, torch.float32) > 0
""",
)

ROOT = Path(__file__).parents[2]
UNEQUAL_HEADS = Plugin(
    "VARIANTS",
    "variants/toy.py",
    "clearhead.variants.toy:GroupedDifferential",
    (ROOT / "tests" / "contracts" / "grouped_differential.py").read_text(encoding="utf-8"),
    f"import sys; sys.path.append({str(ROOT)!r})"
    + MODEL
    + """
from transformers import DynamicCache
from clearhead.core.dispatch import load_backend
from clearhead.nn import Attention
from tests.oracles.grouped_differential import grouped_differential

options = {"ratio": 3, "own_keys": True, "wide": True}
layer = Attention(20, 6, variant="toy", num_kv_heads=2, head_dim=4, **options).double()
with torch.no_grad():
    for parameter in layer.parameters():
        parameter.copy_(0.8 * torch.randn_like(parameter))
named = {n.removeprefix("variant.").removesuffix(".weight"): p for n, p in layer.named_parameters()}
weights = {n: p.detach().clone().requires_grad_() for n, p in named.items()}
x = torch.randn(2, 7, 20, dtype=torch.float64, requires_grad=True)
real = torch.ones(2, 7, dtype=torch.bool)
real[0, :2] = False
sizes = {"signal_heads": 6, "noise_heads": 2, "groups": 2, "width": 4}
expected, _ = grouped_differential(weights, x, causal=True, key_padding=real, **sizes)
gradients = torch.autograd.grad(expected.square().sum(), [x, *weights.values()])
def near(a, b):
    return torch.allclose(a, b, atol=1e-11, rtol=1e-9)
for backend in ("eager", "sdpa", "auto"):
    layer.automatic = backend == "auto"
    if backend != "auto":
        layer.backends = (load_backend(backend),)
    out = layer(x, is_causal=True, key_padding_mask=real)
    assert near(out, expected)
    found = torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])
    assert all(near(a, b) for a, b in zip(found, gradients, strict=True))
cache = DynamicCache()
with torch.no_grad():
    steps = [
        layer(x[:, i : i + 1], is_causal=True, cache=cache, key_padding_mask=real[:, : i + 1]) for i in range(7)
    ]
assert near(torch.cat(steps, 1), expected)
try:
    Attention(20, 6, variant="toy", num_kv_heads=2, head_dim=4, backend="cpu", ratio=3)(x.float(), is_causal=True)
except ValueError as error:
    assert "it takes streams with equally many heads, not 6, 2" in str(error), error
else:
    raise AssertionError("a kernel took unequal heads")
model = build(attention="toy", attention_options={"ratio": 2})
check(model)
assert set(model.diagnostics()) == {"lambda", "lambda_spread"}
from clearhead.models.cost import forward_flops_per_token
twin = build(attention="differential_v2")
own = 32 * 4  # V2's λ projection
fewer = 2 * 8  # V2 has four noise heads of width 8, this variant two, and two rows of q_proj fewer
difference = forward_flops_per_token(twin.config, 9) - forward_flops_per_token(model.config, 9)
assert difference == 2 * 2 * (own + 32 * fewer + 2 * (8 + 8) * 5), difference
""",
)

POSITION = Plugin(
    "POSITIONS",
    "positions/toy.py",
    "clearhead.positions.toy:Toy",
    """
from torch import Tensor
from clearhead.positions.base import Rotation
from clearhead.positions.rope import Rope

class Toy(Rope):
    def rotation(
        self, positions: Tensor, key_positions: Tensor | None = None, length: Tensor | None = None
    ) -> Rotation:
        keys = None if key_positions is None else 2 * key_positions
        return super().rotation(2 * positions, keys, length)
""",
    MODEL
    + """
for attention in VARIANTS:
    check(build(position="toy", attention=attention))
assert not torch.allclose(build(position="toy")(ids).logits, build()(ids).logits)
twice = {"position_ids": 2 * torch.arange(9)[None], "attention_mask": torch.ones_like(ids)}
assert torch.allclose(build(position="toy")(ids).logits, build()(ids, **twice).logits, atol=1e-6)
""",
)

ROPE_SCALING = Plugin(
    "ROPE_SCALINGS",
    "positions/scaling/toy.py",
    "clearhead.positions.scaling.toy:Toy",
    """
from collections.abc import Sequence
from dataclasses import dataclass, replace
from torch import Tensor
from clearhead.positions.scaling.base import RopeScaling, number, plain_frequencies

@dataclass(frozen=True, kw_only=True)
class Toy(RopeScaling):
    slowdown: float

    keys = ("slowdown",)
    depends_on_length = True

    @classmethod
    def from_parameters(cls, head_dim, theta, parameters, max_positions):
        slowdown = number("toy", parameters, "slowdown", 1.0, at_least=1)
        return cls(head_dim=head_dim, theta=theta, slowdown=slowdown)

    def tables(self, dtype=None, device=None) -> Tensor:
        return plain_frequencies(self.head_dim, self.theta, dtype, device)[None] / self.slowdown

    def at(self, tables, length):
        return tables[0] if length is None else tables[0] / (1 + length)

    def attention_factor(self, length=None):
        return 1.0 if length is None else 1 + 1 / length
""",
    MODEL
    + """
scaled = {"rope_type": "toy", "slowdown": 2.0}
for attention in ("softmax", "differential", "differential_v2", "collinear"):
    check(build(attention=attention, rope_parameters=scaled))
model = build(rope_parameters=scaled)
assert not torch.allclose(model(ids).logits, build()(ids).logits)
assert torch.allclose(model(ids).logits, model(ids, rope_length=9).logits)
assert not torch.allclose(model(ids).logits, model(ids, rope_length=20).logits)
from clearhead.nn import Attention
Attention(32, 4, rope_parameters=scaled)(torch.randn(1, 3, 32))
try:
    Attention(32, 4, rope_parameters={"rope_type": "toy", "slow_down": 2.0})
except ValueError as error:
    assert "did you mean 'slowdown'?" in str(error), error
else:
    raise AssertionError("the key was not checked")
""",
)

ENGINE = Plugin(
    "ENGINES",
    "engines/toy.py",
    "clearhead.engines.toy:Toy",
    """
from clearhead.core.dispatch import Caps
from clearhead.engines.eager import Eager

class Toy(Eager):
    name = "toy"
    calls = 0

    def caps(self, device: str) -> Caps:
        return Caps(wide_values="split", maps=True)

    def __call__(self, call, mask, scale):
        Toy.calls += 1
        assert call.v.shape[-1] == call.q.shape[-1]
        return super().__call__(call, mask, scale)
""",
    MODEL
    + """
from clearhead.core.dispatch import load_backend
from clearhead.functional import attention, differential_attention
from clearhead.nn import DifferentialAttention
q, k, v = (torch.randn(2, 4, 5, 8) for _ in range(3))
assert torch.allclose(attention(q, k, v, backend="toy"), attention(q, k, v, backend="eager"))
wide = torch.randn(2, 2, 5, 16)
expected = differential_attention(q, k, wide, 0.3, is_causal=True, backend="eager")
assert torch.allclose(differential_attention(q, k, wide, 0.3, is_causal=True, backend="toy"), expected, atol=1e-6)
DifferentialAttention(32, 4, backend="toy")(torch.randn(1, 3, 32))
before = type(load_backend("toy")).calls
for attention in VARIANTS:
    model = build(attention=attention)
    plain = model(ids).logits
    model.set_attn_implementation("toy")
    assert torch.allclose(model(ids).logits, plain, atol=1e-5)
    check(model)
assert type(load_backend("toy")).calls > before
""",
)

KERNEL = Plugin(
    "KERNELS",
    "kernels/toy.py",
    "clearhead.kernels.toy:Toy",
    """
from torch import Tensor
from clearhead.core.dispatch import Kernel, AttentionProblem
from clearhead.core.streams import Streams, repeat_kv
from clearhead.core.masks import MaskSpec

class Toy(Kernel):
    name = "toy"
    runs = 0

    def refusal(self, problem: AttentionProblem) -> str | None:
        if problem.mixing != "difference" or problem.mask or problem.needs_maps:
            return "it knows the difference of two streams without a mask"
        return None

    def run(self, heads: Streams, mask: MaskSpec, scale: float) -> Tensor:
        Toy.runs += 1
        count = heads.q[0].shape[1]
        keys = heads.k * 2 if heads.shares_keys else heads.k
        one, two = (
            (q @ repeat_kv(k, count).mT * scale).softmax(-1) @ repeat_kv(heads.v, count)
            for q, k in zip(heads.q, keys, strict=True)
        )
        return (one - heads.gate * two).to(one.dtype)
""",
    """
import torch
from clearhead.core.dispatch import load_backend
from clearhead.functional import attention, differential_attention
q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 16)
expected = differential_attention(q, k, v, 0.3, backend="eager")
toy = type(load_backend("toy"))
for backend in ("toy", "auto"):
    before = toy.runs
    assert torch.allclose(differential_attention(q, k, v, 0.3, backend=backend), expected, atol=1e-6)
    assert toy.runs == before + 1
before = toy.runs
differential_attention(q, k, v, 0.3, is_causal=True)
assert toy.runs == before
try:
    differential_attention(q, k, v, 0.3, is_causal=True, backend="toy")
except ValueError as error:
    assert "it knows the difference of two streams without a mask" in str(error)
else:
    raise AssertionError("an explicit choice must not fall back")
""",
)

EVALUATION = Plugin(
    "EVALUATIONS",
    "evals/toy.py",
    "clearhead.evals.toy:Toy",
    """
import torch
from clearhead.analysis.sections import Section
from clearhead.evals.cells import Cell, CellEvaluation, Measured
from clearhead.evals.evaluation import EvaluationConfig, EvaluationResult
from clearhead.evals.subject import Subject
from clearhead.runs.results import RunResults

class ToyConfig(EvaluationConfig):
    factor: float = 1.0
    lengths: list[int] = [8, 16, 32, 64]

class Size(EvaluationResult):
    length: int
    size: float

class ToyResult(EvaluationResult):
    cells: list[Size]
    skipped_cells: dict[str, str]

class Toy(CellEvaluation[ToyConfig, ToyResult, Cell, Size]):
    name, Config, Result, Value = "toy", ToyConfig, ToyResult, Size

    def cells(self, subject: Subject, config: ToyConfig) -> list[Cell]:
        return [Cell(name=f"{length} tokens", length=length) for length in config.lengths]

    def measure(self, subject: Subject, config: ToyConfig, cell: Cell) -> Size:
        weights = sum(p.numel() for p in subject.model.parameters())
        subject.model(input_ids=torch.zeros(1, cell.length, dtype=torch.long, device=subject.device))
        return Size(length=cell.length, size=config.factor * weights)

    def gather(self, subject: Subject, config: ToyConfig, measured: Measured[Cell, Size]) -> ToyResult:
        return ToyResult(cells=measured.values, skipped_cells=measured.skipped)

    def section(self, run: RunResults) -> Section:
        sizes = {arm: [v.cells[0].size for v in seeds.values()] for arm, seeds in self.results(run).items()}
        return Section(self.name, "Toy", "How large is it?", f"The toy says {sizes}.")
""",
    """
import json, os, pathlib
import torch
from clearhead.data.prepare import prepare
from clearhead.evals.runner import evaluate_job
from clearhead.report.build import build_report
from clearhead.train.comparison import arm_tasks
from clearhead.train.pool import place
from clearhead.runs.recipe import RecipeError
from clearhead.runs.recipe_io import parse_recipe
from clearhead.runs.rows import data_spec
from clearhead.runs.directory import open_run
from clearhead.train.trainer import build_model

here = pathlib.Path.cwd()
(here / "text").mkdir()
for number in range(8):
    (here / "text" / f"{number}.txt").write_text(f"document {number} " + "with some words in it " * 20)

def recipe(**options):
    return parse_recipe(
        {
            "name": "t",
            "corpus": {"source": str(here / "text"), "validation_fraction": 0.4},
            "tokenizer": {"vocab_size": 280},
            "data": {"length": 32},
            "model": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
            "train": {"batch_tokens": 64},
            "evaluate": {"suites": ["toy"], "toy": options},
            "arms": [{"name": "A"}],
        },
        source="test",
    )

try:
    recipe(facter=2.0)
except RecipeError as error:
    assert "did you mean 'factor'?" in str(error), error
else:
    raise AssertionError("the option's name was not checked")
chosen = recipe(factor=2.0)
run = here / "run"
run.mkdir()
open_run(run, chosen)
(task,) = arm_tasks(chosen, run)
place(task)
data = prepare(data_spec(task.job))
model = build_model(task.job, data)
model.save_pretrained(task.directory / "model")
data.tokenizer.save_pretrained(task.directory / "model")

# One length is too long, one does not fit into memory, and the run is killed at the last one.
from clearhead.evals.subject import Subject
from clearhead.evals.toy import Toy
from clearhead.models import ClearheadForCausalLM
read = []
forward = ClearheadForCausalLM.forward
class Killed(Exception):
    pass
def seen(self, input_ids, **options):
    length = input_ids.shape[1]
    read.append(length)
    if length == 32:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\\nmany bytes")
    if length == 64 and read.count(64) == 1:
        raise Killed
    return forward(self, input_ids, **options)
ClearheadForCausalLM.forward = seen
Subject.too_long = lambda self, length: "16 tokens is too long" if length == 16 else None
try:
    evaluate_job(task.directory)
except Killed:
    assert read == [8, 32, 64]
else:
    raise AssertionError("the run was not killed")
assert evaluate_job(task.directory) == ["toy"]
assert read == [8, 32, 64, 32, 64], read
assert evaluate_job(task.directory) == []
values = json.loads((task.directory / "results" / "toy.json").read_text())["values"]
assert [cell["length"] for cell in values["cells"]] == [8, 64]
left = {"16 tokens": "16 tokens is too long", "32 tokens": "CUDA out of memory. Tried to allocate"}
assert values["skipped_cells"] == left, values
assert [path.name for path in (task.directory / "results").iterdir()] == ["toy.json"]
build_report(run)
size = 2.0 * sum(p.numel() for p in model.parameters())
(answer,) = [a for a in json.loads((run / "summary.json").read_text())["answers"] if a["section"] == "toy"]
assert str(size) in answer["answer"]
assert "How large is it?" in (run / "report.html").read_text()
""",
)

CONVERTER = Plugin(
    "CONVERTERS",
    "convert/toy.py",
    "clearhead.convert.toy:Toy",
    """
from dataclasses import replace
from clearhead.convert.llama import Llama

KEYS = {"depth": "num_hidden_layers", "width": "hidden_size", "heads": "num_attention_heads"}

def llama(config):
    return {**{KEYS.get(key, key): value for key, value in config.items()}, "model_type": "llama"}

class Toy(Llama):
    def claims(self, source):
        return source.model_type == "toy"

    def configuration(self, source):
        return super().configuration(replace(source, config=llama(source.config)))

    def computation(self, config, weights, dtype):
        return super().computation(llama(config), weights, dtype)

    def shapes(self, config):
        return super().shapes(llama(config))

    def written(self, config):
        found = super().written(config)
        named = {key: found[theirs] for key, theirs in KEYS.items()}
        return {**found, **named, "model_type": "toy"}
""",
    MODEL
    + """
import json
from pathlib import Path
from clearhead.cli.main import app
model = build()
model.save_pretrained("ours")
app(["convert", "ours", "--out", "toy", "--to", "toy"], standalone_mode=False)
config = json.loads(Path("toy/config.json").read_text())
assert config["model_type"] == "toy" and config["depth"] == 2
app(["convert", "toy", "--out", "back"], standalone_mode=False)
assert torch.equal(ClearheadForCausalLM.from_pretrained("back")(ids).logits, model(ids).logits)
""",
)

PLUGINS = (VARIANT, UNEQUAL_HEADS, POSITION, ROPE_SCALING, ENGINE, KERNEL, EVALUATION, CONVERTER)
# What the pages for contributors tell to write.
PAGES = tuple(Plugin(**pages.read(name)._asdict()) for name in pages.SHOWN)


def register(registry: str, plugin: Plugin) -> str:
    """The registry's text with one line more in the plugin's table, or with its empty table's line filled."""
    entry = f'"{plugin.name}": "{plugin.target}"'
    lines = registry.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(plugin.table))
    if lines[start].endswith("{}"):
        lines[start] = f"{lines[start][:-1]}{entry}}}"
    else:
        lines.insert(start + 1, f"    {entry},")
    return "\n".join(lines) + "\n"


RUNNER = """
import io, json, os, pathlib, sys, traceback
# Once for all of them: they take far longer to load than the package.
import torch, torch._dynamo, torch.nn.attention.flex_attention, matplotlib.pyplot
import transformers.generation.utils, transformers.modeling_utils, transformers.trainer

def run(plugin, source, program):
    pathlib.Path(plugin).mkdir()
    os.chdir(plugin)
    sys.path.insert(0, source)
    exec(compile(program, plugin, "exec"), {"__name__": "__main__"})

for plugin, source, program in json.load(sys.stdin):
    assert not any(name.partition(".")[0] == "clearhead" for name in sys.modules)
    child = os.fork()
    if child == 0:
        try:
            run(plugin, source, program)
        except BaseException:
            pathlib.Path(source, "error.txt").write_text(traceback.format_exc())
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        print("---", plugin + "\\n", pathlib.Path(source, "error.txt").read_text())
"""


def package_with(plugin: Plugin, root: Path) -> Path:
    """Where a copy of the package lies that has the plugin's file and its line in the registry."""
    copy = root / "clearhead"
    shutil.copytree(SOURCE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    original = (SOURCE / "registry.py").read_text(encoding="utf-8")
    changed = register(original, plugin)
    lines = difflib.ndiff(original.splitlines(), changed.splitlines())
    assert sum(line.startswith("+ ") for line in lines) == 1
    (copy / "registry.py").write_text(changed, encoding="utf-8")
    assert not (copy / plugin.file).exists()
    (copy / plugin.file).write_text(plugin.text, encoding="utf-8")
    return copy.parent


def run_all(plugins: Sequence[Plugin], root: Path) -> str:
    """What goes wrong where each plugin is used in a process of its own, which has loaded nothing of ours before."""
    programs = []
    for number, plugin in enumerate(plugins):
        package = str(package_with(plugin, root / str(number)))
        check = f"import clearhead; assert clearhead.__file__.startswith({package!r})\n"
        programs.append((f"{number} {plugin.table}", package, check + plugin.use))
    work = root / "work"
    work.mkdir()
    environment = {**os.environ, "CLEARHEAD_CACHE": str(root / "cache"), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=json.dumps(programs),
        cwd=work,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_one_file_and_one_line(tmp_path: Path) -> None:
    broken = replace(VARIANT, use="raise AssertionError('what a failing one says')")
    plugins = [*PLUGINS, *PAGES]
    wrong = run_all([*plugins, broken], tmp_path)
    assert [line for line in wrong.splitlines() if line.startswith("--- ")] == [
        f"--- {len(plugins)} VARIANTS"
    ], wrong
    assert "what a failing one says" in wrong
