"""CALCULATES: the mathematics of experts, on whichever device. Does not know where weights live."""
