"""SAEBench's core evaluation."""
