"""The fused attention kernel for CPUs: C++ sources in `src`, built by `hatch_build.py`, loaded by `library.py`."""
