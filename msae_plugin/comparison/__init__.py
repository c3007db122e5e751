"""Many SAEs on one stream of activations, side by side."""
