"""As much of SGLang as the plug-in meets, written for the tests: hooks, kernels, schemes, and a layer of experts."""
