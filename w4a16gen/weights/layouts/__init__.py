"""The layouts of packed weights, one module each: how bytes are written, read and counted."""
