"""A prompt's attention with blocks of keys left out against the same with all of them: time, blocks kept, error.

Keys and queries are random, or those of a trained model of LLaMA's family that reads a text (`--model`, a GGUF file,
and `--text`, a file of prose): one key-value head with its query heads in each of a few layers, and the first tokens of
one capture for every length, as nothing sees a later token. The differential form takes two of these query heads as
signal and noise, with λ = 0.5: a stand-in, as no differential model of this size reads 16,384 tokens.

Every round has one turn of each form; with one thread the clock is the thread's own processor time. Random keys are the
case in which nothing may be left out: what is over 1 there is what asking costs.
"""

import argparse
import contextlib
import gzip
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clearhead.bench.machine import facts, versions
from clearhead.bench.measure import Call, WallTimer, interleaved, ratios, warm_up
from clearhead.bench.records import append
from clearhead.functional import BlockSparse, attention, differential_attention

FORMS: dict[str, BlockSparse | None] = {
    "dense": None,
    "bound 0.01": BlockSparse(0.01),
    "bound 0.05": BlockSparse(0.05),
    "moments 0.001": BlockSparse(0.001, "moments"),
    "moments 0.01": BlockSparse(0.01, "moments"),
    "moments 0.05": BlockSparse(0.05, "moments"),
}
LAYERS = (3, 8, 15)
Heads = tuple[Tensor, Tensor, Tensor]


class Enough(Exception):
    """The last layer that is wanted has been seen."""


def captured(model: Path, text: Path, tokens: int) -> dict[int, Heads]:
    """By layer, q (1, 3, L, D), k and v (1, 1, L, D) of the first key-value head, turned, as attention gets them."""
    from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, AutoTokenizer

    from clearhead.evals.subjects.gguf import load_gguf

    found: dict[int, Heads] = {}

    def keep(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **settings: Any) -> tuple[Tensor, None]:
        if module.layer_idx in LAYERS:
            few = q.shape[1] // k.shape[1]
            found[module.layer_idx] = (q[:, :few].clone(), k[:, :1].clone(), v[:, :1].clone())
        if module.layer_idx == LAYERS[-1]:
            raise Enough
        out = attention(q, k, v, is_causal=True, scale=settings.get("scaling"))
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("captured", keep)
    AttentionMaskInterface.register("captured", lambda *given, **more: None)
    loaded = load_gguf(AutoModelForCausalLM, model, "model").float().eval()
    loaded.set_attn_implementation("captured")
    tokenizer = load_gguf(AutoTokenizer, model, "tokenizer")
    ids = tokenizer(read(text)[: 8 * tokens], return_tensors="pt").input_ids[:, :tokens]
    if ids.shape[1] < tokens:
        raise SystemExit(
            f"--text: {text} has {ids.shape[1]} tokens in {8 * tokens} characters; {tokens} are needed"
        )
    with contextlib.suppress(Enough):
        loaded.model(ids, use_cache=False)
    return found


def read(path: Path) -> str:
    """A text file, or the texts of compressed JSON lines."""
    if path.suffixes[-2:] != [".jsonl", ".gz"]:
        return path.read_text(encoding="utf-8")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return "\n".join(json.loads(line)["text"] for line in lines)


def made_up(tokens: int) -> dict[int, Heads]:
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, tokens, 64, generator=rng) for heads in (3, 1, 1))
    return {0: (q, k, v)}


def op(kind: str, heads: Heads, sparse: BlockSparse | None) -> Callable[[], Tensor]:
    q, k, v = heads
    if kind == "softmax":
        return lambda: attention(q, k, v, is_causal=True, block_sparse=sparse, backend="cpu")
    pair = q[:, :2]
    return lambda: differential_attention(pair, k, v, 0.5, is_causal=True, block_sparse=sparse, backend="cpu")


def kept(kind: str, heads: Heads, sparse: BlockSparse) -> list[int]:
    """Pairs of a chunk of queries and a block of keys: seen, computed, used."""
    q, k, v = heads
    two = kind == "differential"
    gate = torch.full((1, 1, q.shape[2], 1), 0.5) if two else None
    first, second = (q[:, :1], q[:, 1:2]) if two else (q, None)
    rest = (0, 0, True, q.shape[3] ** -0.5, sparse.left_out, sparse.estimate == "moments")
    call = torch.ops.clearhead.block_sparse_attention
    return list(call(first, second, k, None, v, gate, None, None, None, *rest)[1].tolist())


def measure(
    source: str, kind: str, dtype: torch.dtype, layers: dict[int, Heads], rounds: int
) -> list[dict[str, Any]]:
    """One entry a form."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    cast = {layer: (q.to(dtype), k.to(dtype), v.to(dtype)) for layer, (q, k, v) in layers.items()}
    runs = {name: [op(kind, heads, sparse) for heads in cast.values()] for name, sparse in FORMS.items()}

    def turn(name: str) -> Call:
        def run() -> None:
            for each in runs[name]:
                each()

        return run

    calls = {name: turn(name) for name in FORMS}
    warm_up(calls)
    taken = list(interleaved(calls, rounds, WallTimer(clock)))
    exact = [each().float() for each in runs["dense"]]
    entries = []
    for name, sparse in FORMS.items():
        if sparse is None:
            continue
        ratio = ratios(taken, name, "dense")
        counts = torch.tensor([kept(kind, heads, sparse) for heads in cast.values()]).double()
        outputs = [each().float() for each in runs[name]]
        errors = [float((a - b).norm() / b.norm()) for a, b in zip(outputs, exact, strict=True)]
        rows = torch.cat(
            [((a - b).norm(dim=-1) / b.norm(dim=-1)).flatten() for a, b in zip(outputs, exact, strict=True)]
        )
        entries.append(
            {
                "source": source,
                "kind": kind,
                "dtype": str(dtype).removeprefix("torch."),
                "tokens": exact[0].shape[2],
                "layers": list(layers),
                "form": name,
                "time_over_dense": {"median": ratio.median, "q1": ratio.q1, "q3": ratio.q3},
                "logits_computed": [round(float(x), 4) for x in counts[:, 1] / counts[:, 0]],
                "values_used": [round(float(x), 4) for x in counts[:, 2] / counts[:, 0]],
                "error": errors,
                "error_of_the_worst_row": float(rows.max()),
                "clock": clock.__name__,
                "rounds": rounds,
                "machine": facts(),
                "versions": versions(),
            }
        )
        print(
            f"{source:8} {kind:12} {str(dtype)[6:]:8} {exact[0].shape[2]:6} {name:13} time {ratio.median:.2f} "
            f"({ratio.q1:.2f} to {ratio.q3:.2f})  logits {float((counts[:, 1] / counts[:, 0]).mean()):.2f}  values "
            f"{float((counts[:, 2] / counts[:, 0]).mean()):.2f}  error {sum(errors) / len(errors):.4f}, worst row "
            f"{float(rows.max()):.3f}",
            flush=True,
        )
    return entries


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="a GGUF file; without it random keys alone are measured")
    parser.add_argument("--text", type=Path, help="prose: a text file, or .jsonl.gz with `text` in each line")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192, 16384])
    parser.add_argument(
        "--positions", type=int, default=8192, help="the longest text that the model was trained on"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/block_sparse.jsonl"))
    arguments = parser.parse_args()
    if (arguments.model is None) != (arguments.text is None):
        parser.error("give --model and --text together, or neither")
    torch.set_num_threads(arguments.threads)
    sources: dict[str, dict[int, Heads]] = {"random": made_up(max(arguments.tokens))}
    if arguments.model is not None:
        read_by_it = [tokens for tokens in arguments.tokens if tokens <= arguments.positions]
        sources["trained"] = captured(arguments.model, arguments.text, max(read_by_it))
    for tokens in arguments.tokens:
        for source, layers in sources.items():
            if source == "trained" and tokens > arguments.positions:
                continue
            # A prefix of what was captured is what a shorter prompt has.
            some = {
                layer: (
                    q[:, :, :tokens].contiguous(),
                    k[:, :, :tokens].contiguous(),
                    v[:, :, :tokens].contiguous(),
                )
                for layer, (q, k, v) in layers.items()
            }
            for kind in ("softmax", "differential"):
                for dtype in (torch.float32, torch.bfloat16):
                    append(arguments.out, measure(source, kind, dtype, some, arguments.rounds))


if __name__ == "__main__":
    main()
