"""TensorRT-LLM's source tree: write its kernels' instantiations, and audit what its generator wrote."""
