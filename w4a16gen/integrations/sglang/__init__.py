"""The plug-in of SGLang: its GPTQ, AWQ and compressed-tensors layers, through its registry of hooks."""
