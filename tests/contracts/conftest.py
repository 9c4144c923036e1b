"""FlexAttention as PyTorch's own uncompiled reference, which costs milliseconds, unless a test is marked "compiles"."""

import pytest

from clearhead.engines import flex


@pytest.fixture(autouse=True)
def uncompiled_flex(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks and slopes are this library's, and what they mean does not change when they are compiled.

    Each compilation of them takes some six seconds, so the marked tests do it for a few: all masks, slopes, a model.
    """
    if request.node.get_closest_marker("compiles") is None:
        monkeypatch.setattr(flex, "_compiled_flex", flex._eager_flex)
