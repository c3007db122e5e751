"""Analyses of the weights and logs of SAEs."""
