"""Documents that contradict what a model knows."""
