"""The trained student as a model folder, with its model card."""
