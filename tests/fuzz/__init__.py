"""Random calls against independent oracles, and random kills of a small comparison: `make fuzz`.

calls.py runs random calls (operations.py, modes.py, layers.py, models.py, generation.py, hostile.py) one seed each;
kills.py kills small comparisons. What a call should give is computed by exact.py in float64, how far an answer may be
from it by bounds.py. docs/testing.md says how to use it; test_fuzz.py is all of it that belongs to `make test`.
"""
