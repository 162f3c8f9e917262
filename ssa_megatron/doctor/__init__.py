"""`ssa doctor`: is this machine, or with --cluster this set of machines, fit to train."""
