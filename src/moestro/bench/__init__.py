"""Measures machines and runs: rates of memory and links, and one report of a whole device."""
