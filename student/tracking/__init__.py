"""Logs of a training: files, TensorBoard, MLflow, W&B, and progress lines."""
