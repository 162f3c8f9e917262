"""DeepSpeed ZeRO: the generated configuration, and the optimizer that shards and steps."""
