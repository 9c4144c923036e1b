"""Looking at attention: where each head of a model looks, on a page or in a picture."""
