"""Comparisons and reports for those who work on Moestro, run from a checkout; users have `moestro bench`."""
