"""From a name to a model that runs: options, checkpoint, plan, weights."""
