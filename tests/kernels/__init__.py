"""Tests of `kernels`: each file judges one part, against the oracle and by properties."""
