"""Publishing on the Hugging Face Hub: model cards, uploads and their checks."""
