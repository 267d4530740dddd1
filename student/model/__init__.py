"""The student model: built, pruned from a teacher, or loaded."""
