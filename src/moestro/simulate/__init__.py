"""The virtual clock: machines that are modelled, traces of routing, and policies replayed over them."""
