"""Speed alone: sparse decoding, Triton kernels, CUDA graphs."""
