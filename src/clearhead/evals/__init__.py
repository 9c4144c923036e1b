"""Evaluations in wings, on rooms they share: the contract, asking, probing and subjects."""
