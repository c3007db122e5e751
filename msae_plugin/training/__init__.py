"""Training runs: the language model, the text, the recipe and the loop."""
