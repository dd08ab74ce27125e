"""As much of SGLang as the plug-in meets, written for the tests: its registry of hooks, two kernels and a scheme."""
