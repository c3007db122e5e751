"""What `benchmarks/profile_parts.py` measures: one module per thing that is split into parts."""
