"""One MoE layer step: routing in, the weighted sum of the experts out."""
