"""What a trained SAE is worth: measurements on text it was not trained on."""
