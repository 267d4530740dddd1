"""What the jobs of a run leave in its storage. A job writes its JSON file last: without it, the job is not done.

The capture's is `FAITHFULNESS_JSON`, in every teacher's cache (`pipeline/cache/storage/layout.py`).
"""

TRAIN_JSON = "train.json"
"""Of a training, in its folder."""
REPORT_JSON = "report.json"
"""Of the evaluation, in the run's storage."""
REPORT_TXT = "report.txt"
"""The report's table."""
EXPORT = "export"
"""Folder of the exported students."""
PROVENANCE_JSON = "provenance.json"
"""Of an export, in every student's folder."""
