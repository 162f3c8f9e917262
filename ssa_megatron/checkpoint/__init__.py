"""Checkpoints: topology-free, verified, committed by one rename."""
