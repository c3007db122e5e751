"""Files of an SAE for other tools: one module for each, and `table` with all of them."""
