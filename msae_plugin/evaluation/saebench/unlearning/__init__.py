"""SAEBench's unlearning evaluation."""
