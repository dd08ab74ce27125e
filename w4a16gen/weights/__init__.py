"""4-bit weights: quantised, packed, imported, and multiplied exactly. numpy only."""
