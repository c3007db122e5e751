"""The mechanisms of a training SAE, each switchable alone."""
