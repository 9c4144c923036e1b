"""One kernel compiled for a GPU that need not be there, and what the compiled object says of itself.

NVIDIA: registers and stack from `cuobjdump -res-usage`, instructions from `cuobjdump -sass`; that tool is part of
Triton's wheel. AMD: from the assembly that Triton keeps beside the object. A stack or an instruction on local memory is
a spill.
"""

import re
import subprocess
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from clearhead.kernels.triton import backward, forward
from clearhead.kernels.triton.configs import Config, Key

# Shared memory a block may have, in bytes: NVIDIA's programming guides, table "Technical specifications"; AMD's LDS.
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
MASKS = ("causal", "everything")
# Sets of their own: endings of a row in the forward pass (V1's and softmax's head norm, V2's sigmoid), and keys that
# are held at half their width behind few rows, with what masks a cache of fixed size has.
ENDED, COMPACT = "causal, ended", "compact"
_BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_TYPES = {16: "bf16", 32: "fp32"}
_NUMBERS = ("q1", "q2", "k1", "k2", "v", "out", "noise", "mixed", "weight", "grad")
_POINTERS = {"padding": "u8", "documents": "i64", "position": "i64", "ranges": "i32"}
# Read or written in float32 whatever the inputs are.
_SINGLES = [
    "gate",
    "slopes",
    "table",
    "statistics",
    "parts",
    "delta",
    "grad_q1",
    "grad_q2",
    "grad_k1",
    "grad_k2",
    "grad_v",
]
_MIX = {
    "matrix": r"^(HMMA|HGMMA|IMMA|UTC\w*MMA|v_mfma\w*)",
    "exponential": r"^(MUFU\.EX2|v_exp_f32\w*)",
    "fma": r"^(FFMA2?|v_fma\w*|v_pk_fma\w*|v_fmac\w*)$",
    "asynchronous loads": r"^(LDGSTS|UBLKCP|UTMALDG)",
    "local memory": r"^(LDL|STL|scratch_load\w*|scratch_store\w*)",
}


def target_of(architecture: str) -> GPUTarget:
    if architecture.startswith("sm_"):
        return GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    return GPUTarget("hip", architecture, 64)


def flags(key: Key, config: Config, masks: str) -> dict[str, Any]:
    """The kernel's constants: V1's own keys where the value is wide, else shared ones."""
    everything, compact, ended = masks == "everything", masks == COMPACT, masks == ENDED
    width = key.width // 2 if compact else key.width
    shared = key.streams == 2 and key.value_width == key.width
    constants: dict[str, Any] = {
        "D": width,
        "E": key.value_width,
        "WIDTH": width,
        "VALUES": key.value_width,
        "REPEATS": 4 if everything or key.direction == "decode" else 1,
        "STREAMS": key.streams,
        "OWN_KEYS": key.streams == 2 and not shared,
        "CAUSAL": True,
        "PRECISION": "ieee",
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
    }
    constants |= dict.fromkeys(("WINDOW", "PADDING", "DOCUMENTS", "POSITION", "SLOPES"), everything)
    if compact:
        constants |= dict.fromkeys(("WINDOW", "PADDING", "POSITION"), True)
    if key.direction != "backward":
        constants |= {"KEEP": key.direction == "forward", "SPLIT": key.direction == "decode"}
        constants |= {"TABLE": compact, "SIGMOID": ended and shared, "NORM": ended and not shared}
    return constants


def source(key: Key, config: Config, masks: str) -> ASTSource:
    kernel = backward.backward if key.direction == "backward" else forward.forward
    constants, number = flags(key, config, masks), _TYPES[key.bits]
    signature, attributes = {}, {}
    for at, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        if name in _NUMBERS:
            signature[name] = f"*{number}"
        elif name in _POINTERS:
            signature[name] = f"*{_POINTERS[name]}"
        elif name in _SINGLES:
            signature[name] = "*fp32"
        else:
            signature[name] = "fp32" if name in ("factor", "eps", "gain") else "i32"
        # What the launcher finds of contiguous tensors: pointers and strides of q, k, v and the output in sixteens.
        if signature[name].startswith("*") or re.fullmatch(r"stride_[qkvodt][bhgt]", name):
            attributes[(at,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def compile_one(key: Key, config: Config, masks: str) -> dict[str, Any]:
    """What came of it; "refused" with the compiler's reason where it makes no object."""
    options = {"num_warps": config.warps, "num_stages": config.stages}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = triton.compile(
                source(key, config, masks), target=target_of(key.architecture), options=options
            )
    except Exception as error:  # the compilers raise what they like
        return {"refused": " ".join(str(error).split())[:200] or type(error).__name__}
    found = {"shared": int(made.metadata.shared)}
    found |= read_nvidia(made.asm["cubin"]) if "cubin" in made.asm else read_amd(made.asm["amdgcn"])
    return found | {"shared fits": found["shared"] <= SHARED[key.architecture]}


def read_nvidia(cubin: bytes) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)

        def told(option: str) -> str:
            command = [str(_BINARIES / "cuobjdump"), option, str(file)]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage, listing = told("-res-usage"), told("-sass")
    # A tensor-memory kernel brings small functions of its own: the widest is the kernel.
    words = max(
        (dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", line)) for line in usage.splitlines() if "REG:" in line),
        key=lambda found: int(found["REG"]),
    )
    opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", listing, re.MULTILINE)
    mix = count(opcodes)
    spilled = int(words["STACK"]) + int(words["LOCAL"]) + mix["local memory"]
    return {"registers": int(words["REG"]), "spills": spilled, "instructions": len(opcodes), "mix": mix}


def read_amd(assembly: str) -> dict[str, Any]:
    def told(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s+(\d+)", assembly)[-1])

    opcodes = re.findall(r"^\t([a-z]\w+)", assembly, re.MULTILINE)
    return {
        # Vector registers with the accumulators, of 512 a lane at one wave a SIMD.
        "registers": told("vgpr_count"),
        "spills": told("vgpr_spill_count") + told("private_segment_fixed_size"),
        "instructions": len(opcodes),
        "mix": count(opcodes),
    }


def count(opcodes: list[str]) -> dict[str, int]:
    every = Counter(opcodes)
    return {
        name: sum(
            n
            for opcode, n in every.items()
            if re.match(pattern, opcode if name != "fma" else opcode.split(".")[0])
        )
        for name, pattern in _MIX.items()
    }


def good(found: dict[str, Any]) -> bool:
    return "refused" not in found and found["spills"] == 0 and found["shared fits"]
