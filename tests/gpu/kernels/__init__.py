"""The Triton kernels on a real GPU, over the full grid of shapes."""
