"""The kernel of GPTQModel, which serves GPTQ and AWQ models of transformers too.

Call `register` once, before a model is loaded:

    import w4a16gen.integrations.gptqmodel

    w4a16gen.integrations.gptqmodel.register()
"""

from w4a16gen.integrations.gptqmodel.registration import register

__all__ = ["register"]
