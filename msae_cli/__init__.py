"""The command line `msae`, apart from `msae_plugin` so that it answers at once.

Importing any part of `msae_plugin` registers the architecture, which imports SAELens,
TransformerLens and torch: ten seconds. Help and mistakes in the arguments do not wait for that:
nothing here imports `msae_plugin` before a command really runs.
"""
