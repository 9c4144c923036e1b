"""Evaluations in wings, on rooms they share: the contract, asking, probing and subjects."""

from clearhead.extras import need

need("clearhead.evals", "hf")
