"""As much of GPTQModel as the kernels meet, written for the tests: base classes, enumerations, the table of kernels."""
