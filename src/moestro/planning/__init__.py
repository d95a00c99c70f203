"""DECIDES: where an expert is computed and when it moves. Pure Python: no torch, no other wing, any clock."""
