"""Scorers: how a model is asked about an example, and how its answer becomes one score for each label."""
