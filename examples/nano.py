"""A small language model in one file: clearhead's attention layers in a Transformer that is written out here.

    python examples/nano.py notes.txt --attention differential --steps 300

It trains on the bytes of a text file, prints its loss and writes a little text of its own. The blocks are those of
`clearhead.models`: with the same weights the logits are the same.
"""

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clearhead.nn import Attention

BYTES = 256


class FeedForward(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Block(nn.Module):
    """Attention and feed-forward layer, each behind a norm and beside a residual path."""

    def __init__(self, attention: str, width: int, heads: int, inner: int, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = Attention(width, heads, variant=attention, layer_idx=layer_idx)
        self.mlp = FeedForward(width, inner)
        self.input_layernorm = nn.RMSNorm(width, eps=1e-5)
        self.post_attention_layernorm = nn.RMSNorm(width, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), is_causal=True)
        return x + self.mlp(self.post_attention_layernorm(x))


class Nano(nn.Module):
    """Bytes (B, L) -> logits (B, L, 256). attention: the name of any registered variant."""

    def __init__(
        self,
        attention: str = "differential",
        width: int = 128,
        layers: int = 4,
        heads: int = 8,
        vocabulary: int = BYTES,
        inner: int | None = None,
    ) -> None:
        super().__init__()
        inner = inner or 8 * width // 3
        self.embed_tokens = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Block(attention, width, heads, inner, i) for i in range(layers))
        self.norm = nn.RMSNorm(width, eps=1e-5)
        for name, weight in self.named_parameters():
            if name.endswith(("proj.weight", "embed_tokens.weight")):
                nn.init.normal_(weight, std=width**-0.5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x)
        return F.linear(self.norm(x), self.embed_tokens.weight)

    @torch.no_grad()
    def write(self, ids: Tensor, count: int) -> Tensor:
        """`ids` (1, L) with `count` more, each drawn from what the model gives it."""
        for _ in range(count):
            likely = self(ids)[:, -1].softmax(-1)
            ids = torch.cat([ids, torch.multinomial(likely, 1)], dim=1)
        return ids


def batch(text: Tensor, rows: int, length: int) -> tuple[Tensor, Tensor]:
    """Rows from random places of the text, and the bytes that follow each of theirs."""
    starts = torch.randint(len(text) - length, (rows,)).tolist()
    found = torch.stack([text[start : start + length + 1] for start in starts])
    return found[:, :-1], found[:, 1:]


def train(model: Nano, text: Tensor, steps: int, rows: int = 16, length: int = 128) -> float:
    """Train with AdamW and a falling rate; returns the mean loss of the last tenth of the steps, in bits per byte."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses, began = [], time.monotonic()
    for step in range(1, steps + 1):
        ids, following = batch(text, rows, length)
        loss = F.cross_entropy(model(ids).flatten(0, 1), following.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item() / math.log(2))
        if step % 50 == 0:
            speed = step * rows * length / (time.monotonic() - began)
            print(f"step {step}: {losses[-1]:.3f} bits per byte, {speed:,.0f} bytes/s", flush=True)
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", type=Path)
    parser.add_argument(
        "--attention", default="differential", help="softmax, differential_v2, collinear, ..."
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    content = given.text.read_bytes()
    if len(content) < 1000:
        parser.error(f"{given.text} has {len(content)} bytes; a text of at least 1,000 is needed")
    torch.manual_seed(given.seed)
    model = Nano(given.attention)
    loss = train(model, torch.frombuffer(bytearray(content), dtype=torch.uint8).long(), given.steps)
    print(f"{given.attention}: {loss:.3f} bits per byte")
    start = torch.tensor([list(content[:32])])
    print(bytes(model.write(start, 200)[0].tolist()).decode("utf-8", errors="replace"))


if __name__ == "__main__":
    main()
