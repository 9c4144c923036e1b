"""A vision Transformer in one file: clearhead's attention layers on images, and twins compared over seeds.

    python examples/vision_transformer.py --variants softmax differential differential_v2 collinear --seeds 5

It trains on scikit-learn's handwritten digits (1,797 images of 8 by 8 pixels, part of that package: nothing is
downloaded). An image becomes a row of patches; every patch sees all others (`is_causal` stays False). Twins differ in
the variant alone: with one seed they share the split into training and test images and the order of the batches.
"""

import argparse
import math
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clearhead.nn import Attention

SIDE, CLASSES = 8, 10


class Block(nn.Module):
    """Attention and a feed-forward layer, each behind a norm and beside a residual path."""

    def __init__(self, variant: str, width: int, heads: int, layer_idx: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, heads, variant=variant, layer_idx=layer_idx)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class VisionTransformer(nn.Module):
    """Images (B, 8, 8) -> logits (B, 10). variant: the name of any registered variant.

    Patches are read row by row; a learned vector for each place is added, and rotary angles follow the reading order
    (collinear attention is defined by them, so that all twins have them).
    """

    def __init__(
        self, variant: str = "softmax", width: int = 64, layers: int = 4, heads: int = 4, patch: int = 2
    ) -> None:
        super().__init__()
        self.patch = patch
        self.embed = nn.Linear(patch * patch, width)
        self.places = nn.Parameter(torch.randn((SIDE // patch) ** 2, width) * 0.02)
        self.blocks = nn.ModuleList(Block(variant, width, heads, index) for index in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        # (B, 8, 8) -> (B, tokens, patch · patch)
        rows = images.unfold(1, self.patch, self.patch).unfold(2, self.patch, self.patch)
        x = self.embed(rows.flatten(3).flatten(1, 2)) + self.places
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(self.norm(x).mean(dim=1))
        return out


def load_digits() -> tuple[Tensor, Tensor]:
    """Images (1797, 8, 8) between 0 and 1, and their digits (1797,)."""
    from sklearn.datasets import load_digits as read

    found = read()
    return torch.from_numpy(found.images).float() / 16, torch.from_numpy(found.target).long()


def split(count: int, seed: int, held_out: float = 0.2) -> tuple[Tensor, Tensor]:
    """Numbers of the training and of the test images; every variant gets the same for a seed."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    border = round(count * held_out)
    return order[border:], order[:border]


def train(
    variant: str, seed: int, images: Tensor, labels: Tensor, epochs: int, rate: float, **sizes: int
) -> float:
    """Train one model and return its accuracy on the test images of its seed."""
    torch.manual_seed(seed)
    model = VisionTransformer(variant, **sizes)
    learned, tested = split(len(images), seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    batch = 64
    steps = epochs * math.ceil(len(learned) / batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    # A generator of its own: what a variant draws for its weights does not change the order of the images.
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for chosen in learned[torch.randperm(len(learned), generator=order)].split(batch):
            loss = F.cross_entropy(model(images[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        right = model.eval()(images[tested]).argmax(-1) == labels[tested]
    return right.float().mean().item()


def summary(variant: str, scores: Sequence[float], twins: Sequence[float], tested: int) -> str:
    """One line: mean accuracy over seeds, and the paired difference from the first variant with its standard error."""
    found, gaps = torch.tensor(scores), torch.tensor(scores) - torch.tensor(twins)
    line = (
        f"{variant:28s} {100 * found.mean():6.2f} %  (n = {tested} test images a seed, {len(scores)} seeds)"
    )
    if scores is not twins and len(scores) > 1:
        error = gaps.std() / len(scores) ** 0.5
        line += f"  {100 * gaps.mean():+.2f} ± {100 * error:.2f} points (standard error over seeds)"
    return line


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variants", nargs="+", default=["softmax", "differential"])
    parser.add_argument("--seeds", type=int, default=5, help="how many; they are 0, 1, 2, ...")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--rate", type=float, default=2e-3)
    given = parser.parse_args()
    images, labels = load_digits()
    tested = len(split(len(images), 0)[1])
    scores: dict[str, list[float]] = {variant: [] for variant in given.variants}
    for seed in range(given.seeds):
        for variant in given.variants:
            began = time.monotonic()
            scores[variant].append(train(variant, seed, images, labels, given.epochs, given.rate))
            taken = time.monotonic() - began
            print(f"seed {seed} {variant}: {100 * scores[variant][-1]:.2f} % ({taken:.0f} s)", flush=True)
    for variant in given.variants:
        print(summary(variant, scores[variant], scores[given.variants[0]], tested))


if __name__ == "__main__":
    main()
