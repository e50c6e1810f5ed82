"""Experiments: they measure a model and write no checkpoint."""
