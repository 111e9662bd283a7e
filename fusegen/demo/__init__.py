"""``make demo``: what the zoo's models make, the plans behind it, and the time beside eager PyTorch; a file a model."""
