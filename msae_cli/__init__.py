"""The command line `msae`, apart from `msae_plugin` so that it answers at once.

SAELens, TransformerLens and torch take eight seconds to import. Help and mistakes in the arguments
do not wait for that: nothing here imports them before a command really runs.
"""
