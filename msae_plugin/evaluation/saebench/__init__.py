"""SAEBench's evaluations, run on SAEs and models that it cannot load by itself."""
