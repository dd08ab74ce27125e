"""As much of vLLM as the plug-in meets, written for the tests: parameters, layers, configurations, the list of kernels.

`tests/integrations/interfaces.json` holds the names and signatures of vLLM itself, and a test compares these with it.
"""
