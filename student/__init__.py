"""The student's wing: batches, losses, and the training job. Imports `pipeline`, never `actors`."""
