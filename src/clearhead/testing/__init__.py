"""Oracles and contract checks for variants, positions, engines and kernels, the project's own and other people's.

Each check raises AssertionError with one sentence, so it works in any test runner and needs none. The oracles in
`clearhead.testing.oracles` are float64 loops written from the papers; they share no line with what they check.
"""

from clearhead.testing import oracles
from clearhead.testing.backends import Checked, check_engine, check_kernel
from clearhead.testing.masks import MASKS, Mask, make_mask
from clearhead.testing.positions import check_position
from clearhead.testing.variants import check_variant, make_layer

__all__ = [
    "MASKS",
    "Checked",
    "Mask",
    "check_engine",
    "check_kernel",
    "check_position",
    "check_variant",
    "make_layer",
    "make_mask",
    "oracles",
]
