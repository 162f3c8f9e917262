"""Object stores: one module per URL scheme."""
