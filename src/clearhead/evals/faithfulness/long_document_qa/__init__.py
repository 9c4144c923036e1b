"""Questions on long documents."""
