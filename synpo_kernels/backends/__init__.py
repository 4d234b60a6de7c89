"""Who does the arithmetic: plain torch, Triton kernels, the C++ extension; and the loops over the vocabulary they share."""
