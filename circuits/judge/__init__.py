"""Judging scores and circuits: agreement with exact effects, faithfulness, areas by size."""
