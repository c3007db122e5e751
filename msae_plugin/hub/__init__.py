"""What leaves the machine: exports, their checks, and what is kept out of them."""
