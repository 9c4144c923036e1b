"""What an accelerator can do, by the name that its maker gives it."""

import re

import torch

_NAMES = re.compile(r"sm_\d{2,3}|gfx[0-9a-f]{3,5}")
_known: dict[int | None, str | None] = {}


def capability_of(device: torch.device) -> str | None:
    """The compute capability, for example "sm_90" (NVIDIA) or "gfx942" (AMD); None where there is none to ask."""
    return _of_gpu(device.index) if device.type == "cuda" else None


def _of_gpu(index: int | None) -> str | None:
    if not torch.cuda.is_available():
        return None
    # Without an index it is the current one, which may change.
    number = torch.cuda.current_device() if index is None else index
    if number not in _known:
        properties = torch.cuda.get_device_properties(number)
        if torch.version.hip:
            _known[number] = str(properties.gcnArchName).partition(":")[0]
        else:
            _known[number] = f"sm_{properties.major}{properties.minor}"
    return _known[number]


# What `torch.compiler.assume_constant_result` does, which would import the whole compiler to do it.
_of_gpu._dynamo_marked_constant = True  # type: ignore[attr-defined]


def parse_device(text: str) -> tuple[torch.device, str | None]:
    """A device by its name ("cpu", "cuda", "cuda:1"), or one that is not here by its capability ("cuda:sm_90").

    Raises ValueError for what is neither.
    """
    kind, _, rest = text.partition(":")
    if kind == "cuda" and _NAMES.fullmatch(rest):
        return torch.device(kind), rest
    try:
        device = torch.device(text)
    except RuntimeError:
        raise ValueError(
            f"{text!r} is no device: give one such as cpu, cuda or cuda:1, or a GPU that is not here by its "
            "capability, such as cuda:sm_90 or cuda:gfx942"
        ) from None
    return device, capability_of(device)


def compute_capability(name: str | None) -> tuple[int, int] | None:
    """(9, 0) of "sm_90"; None for what is no GPU of NVIDIA's."""
    if name is None or not name.startswith("sm_"):
        return None
    number = int(name.removeprefix("sm_"))
    return number // 10, number % 10


def against_gpu(capability: str | None, least: tuple[int, int] | None, amd: bool) -> str | None:
    """Why what needs NVIDIA's compute capability `least`, and runs on AMD's GPUs or not, does not run on this GPU.

    None where it does, and where there is no GPU to ask.
    """
    if capability is not None and capability.startswith("gfx") and not amd:
        return f"it does not run on AMD's GPUs ({capability})"
    found = compute_capability(capability)
    if found is None or least is None or found >= least:
        return None
    needed = ".".join(map(str, least))
    return f"it needs a GPU of compute capability {needed} or higher, not {found[0]}.{found[1]}"
