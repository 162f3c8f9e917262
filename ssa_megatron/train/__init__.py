"""The training loop and what it leaves in the run folder."""
