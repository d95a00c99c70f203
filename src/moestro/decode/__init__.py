"""A decode step with less in the way: fused on the CPU, captured once and replayed on a device."""
