"""Float64 oracles: attention, positions and layers in loops and einsums, written from the papers.

They import nothing of the implementation, so that an error there cannot be an error here. They are slow: use sizes
below ten.
"""
