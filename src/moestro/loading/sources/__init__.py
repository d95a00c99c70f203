"""Checkpoints as people have them: one file a kind, each says which bytes of its files are which weight.

Knows files, formats of tensors and families' names; does not know where weights go or how they are computed with.
"""

from __future__ import annotations

from .base import ExpertWeights, Part, Source, Weights, floats_of
from .open import open_source

__all__ = ["ExpertWeights", "Part", "Source", "Weights", "floats_of", "open_source"]
