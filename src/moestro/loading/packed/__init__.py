"""Packed folders: a model as it lies in memory, written to disk and read back without quantizing (docs/formats.md)."""
