"""What weights a model has, by its config and the headers of its files alone. Imports no torch.

survey("mistralai/Mixtral-8x7B-v0.1").layers[0].experts    # 8; some hundred KB by ranged requests
"""

from __future__ import annotations

from .found import DenseWeight, ExpertLayer, Survey
from .survey import survey, survey_files, survey_shape

__all__ = ["DenseWeight", "ExpertLayer", "Survey", "survey", "survey_files", "survey_shape"]
