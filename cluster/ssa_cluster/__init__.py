"""Launching on many machines: the launcher, SLURM templates, submission. Calls the command line and imports nothing of ours."""
