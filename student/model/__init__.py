"""The student model: pruned from a teacher, loaded from a checkpoint, or built from a config."""
