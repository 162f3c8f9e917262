"""SSA-Megatron: pretraining with Sparse Sparse Attention."""

__version__ = "0.1.0"
