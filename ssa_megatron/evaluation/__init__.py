"""Evaluation of trained models: `ssa evaluate`."""
