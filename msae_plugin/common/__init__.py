"""Shared ground: errors, files, recipes, progress, interruption, random streams."""
