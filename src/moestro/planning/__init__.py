"""DECIDES: who computes an expert and when it moves. Pure Python: no torch, no other wing, any clock."""
