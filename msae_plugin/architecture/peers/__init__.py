"""Peers that SAELens does not have."""
