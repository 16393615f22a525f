"""Exact effects: what patching a component or an edge really does."""
