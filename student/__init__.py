"""Training of students from caches. Imports `pipeline`, never `actors`."""
