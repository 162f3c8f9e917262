"""The model: megatron-core GPTModel with SSA attention, and the global names of its weights."""
