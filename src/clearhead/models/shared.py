"""What the layers of one forward pass are handed, and how it follows them to other devices."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from clearhead.core.attend import Prepared, prepare
from clearhead.core.dispatch import AttentionProblem, Backend
from clearhead.core.masks import MaskSpec
from clearhead.core.values import moved
from clearhead.models.serving import Masks
from clearhead.positions.base import Rotation


@dataclass(frozen=True, slots=True)
class Plans:
    """A problem, its mask, the backends to choose from, and what came of them on the problem's device."""

    problem: AttentionProblem
    mask: MaskSpec
    backends: tuple[Backend, ...]
    automatic: bool
    prepared: Prepared

    @classmethod
    def make(
        cls, problem: AttentionProblem, mask: MaskSpec, backends: tuple[Backend, ...], automatic: bool
    ) -> "Plans":
        return cls(problem, mask, backends, automatic, prepare(backends, problem, mask, automatic))

    @property
    def takes_logits(self) -> bool:
        return self.prepared.plan.backend.takes_logits

    def on(self, device: torch.device) -> "Plans":
        """The same elsewhere: devices of another type may choose another backend."""
        return Plans.make(self.problem.on(device), moved(self.mask, device), self.backends, self.automatic)


@dataclass(slots=True)
class Shared:
    """What all layers with one position method share in a forward pass: made on `device`, where the embeddings are.

    plans:  None in a server's forward pass, which has its own masks, in `masks`.
    table:  what turns held keys into keys, for compact caches.
    """

    device: torch.device
    rotation: Rotation
    plans: Plans | None
    table: Tensor | None = None
    masks: Masks | None = None
    elsewhere: dict[torch.device, "Shared"] = field(default_factory=dict)

    def on(self, device: torch.device) -> "Shared":
        """For a layer on `device`, made once a pass for each of them."""
        if device == self.device:
            return self
        if device not in self.elsewhere:
            table = None if self.table is None else self.table.to(device)
            plans = None if self.plans is None else self.plans.on(device)
            masks = None if self.masks is None else moved(self.masks, device)
            self.elsewhere[device] = Shared(device, self.rotation.to(device), plans, table, masks)
        return self.elsewhere[device]
