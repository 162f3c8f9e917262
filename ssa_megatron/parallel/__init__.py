"""Processes: where each stands, what may be combined, and running without a GPU."""
