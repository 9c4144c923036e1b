"""Random calls against independent oracles, and random kills of a small comparison: `make fuzz`.

run.py makes random calls (operations.py, modes.py, layers.py, models.py, generation.py) one seed each. What a call
should give is computed by exact.py in float64, how far an answer may be from it by bounds.py. kills.py then kills small
comparisons (comparison.py) at events or moments of theirs (interrupts.py). docs/architecture.md says how to use it;
test_fuzz.py and test_kills.py are all of it that belongs to `make test`.
"""
