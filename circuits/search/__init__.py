"""Choosing a circuit: by rank, by pruning, by measuring."""
