"""`ssa status`: where runs stand, from their folders alone."""
