"""The trained student as a model folder with a model card."""
