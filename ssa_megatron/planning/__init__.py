"""What a run will need, before any GPU is held: bytes, communication, time, and the topologies worth trying."""
