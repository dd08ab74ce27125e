"""What a 4-bit weight is: quantised, packed, imported, and multiplied exactly. numpy only."""
