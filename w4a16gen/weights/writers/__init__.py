"""Write folders of weights: packed ones, and quantized ones for other programs."""
