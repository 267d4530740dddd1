"""Files that the jobs of a run write into its storage. A job writes its JSON file last: without it, it is not done.

The capture's is `FAITHFULNESS_JSON`, in every teacher's cache (`pipeline/cache/storage/layout.py`).
"""

TRAIN_JSON = "train.json"
"""Record of a training, in its folder."""
REPORT_JSON = "report.json"
"""Result of the evaluation, in the run's storage."""
REPORT_TXT = "report.txt"
"""The report's table."""
EXPORT = "export"
"""Folder of the exported students."""
PROVENANCE_JSON = "provenance.json"
"""Record of an export, in every exported student's folder."""
