"""The capture job: Ray actors host teachers, score the corpus and commit shards. Imports `pipeline`, not `student`."""
