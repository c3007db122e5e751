"""Text: corpora, the held-out split, labelled sets."""
