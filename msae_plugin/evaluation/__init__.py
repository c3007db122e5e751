"""Measurements of trained SAEs on text they were not trained on."""
