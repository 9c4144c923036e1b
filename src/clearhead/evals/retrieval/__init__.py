"""Evaluations of retrieval: facts hidden in long text."""
