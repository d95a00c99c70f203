"""KEEPS AND MOVES: where expert weights live and how they travel. Knows bytes, not mathematics."""
