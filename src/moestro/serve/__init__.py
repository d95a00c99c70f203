"""Many requests for text at once, over one model: what stands between a server's connections and the model's steps."""
