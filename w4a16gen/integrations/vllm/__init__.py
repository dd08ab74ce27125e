"""The plug-in of vLLM: a kernel for its mixed-precision linear layers, and its GPTQ configuration with more models."""
