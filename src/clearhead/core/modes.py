"""Ways to differentiate or batch a function that an ordinary backward pass knows nothing of."""

import torch
import torch.autograd.forward_ad as forward_ad
from torch._C._functorch import TransformType, get_interpreter_stack

# What an engine made of ordinary differentiable operators has; the names in sentences.
MODES = {
    "forward": "forward-mode derivatives (jvp, jacfwd, dual numbers)",
    "second": "derivatives of derivatives (hessian, grad of grad)",
    "grad": "torch.func's gradients (grad, vjp, jacrev)",
    "vmap": "torch.func.vmap",
}
NONE: frozenset[str] = frozenset()


def active_modes() -> frozenset[str]:
    """The names in `MODES` of what is going on around this call, whichever tensors it concerns.

    A fused operator that defines a backward pass alone would be taken for a constant by the others, without a word.
    """
    # Both questions are cheap, and `torch.compile` can follow them.
    forward = forward_ad._current_level >= 0
    if torch._C._are_functorch_transforms_active():
        found = _transforms()
        return found | {"forward"} if forward else found
    return frozenset({"forward"}) if forward else NONE


def refused_modes(active: frozenset[str], known: frozenset[str]) -> str | None:
    """The sentence for what is going on and is not `known`; None if all is."""
    unknown = [text for name, text in MODES.items() if name in active - known]
    return f"it has no {unknown[0]}" if unknown else None


def _transforms() -> frozenset[str]:
    kinds = [layer.key() for layer in get_interpreter_stack() or ()]
    gradients = kinds.count(TransformType.Grad)
    found = {
        "forward": TransformType.Jvp in kinds,
        "second": gradients > 1,
        "grad": gradients > 0,
        "vmap": TransformType.Vmap in kinds,
    }
    return frozenset(name for name, used in found.items() if used)


# What `torch.compiler.assume_constant_result` does, which would import the whole compiler to do it.
_transforms._dynamo_marked_constant = True  # type: ignore[attr-defined]
