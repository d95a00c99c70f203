"""Shapes of real models: what a depth means, where some layers have no experts."""

from __future__ import annotations

import pytest

from moestro.errors import RequestError
from moestro.loading.random_model import shape_config
from moestro.planning.shapes import REAL_SHAPES, depth_of_shape, least_depth, spec_of_shape


@pytest.mark.parametrize("shape", REAL_SHAPES)
def test_a_depth_counts_all_layers_those_without_experts_too(shape: str) -> None:
    depth, least = depth_of_shape(shape), least_depth(shape)
    for layers in (least, least + 1, depth):
        assert depth_of_shape(shape, layers) == layers == shape_config(shape, layers).num_hidden_layers
        assert len(spec_of_shape(shape, layers).layers) == layers - (least - 1)
    wrong = [(0, "give fewer"), (depth + 1, "give fewer"), *((layers, "no experts") for layers in range(1, least))]
    for layers, says in wrong:
        with pytest.raises(RequestError, match=says):
            depth_of_shape(shape, layers)
