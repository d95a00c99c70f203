"""Comparisons and reports for work on Moestro itself, run from a checkout; users have `moestro bench`."""
