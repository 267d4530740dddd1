"""The teachers' wing: engines, signals, and the capture job. Imports `pipeline`, never `student`."""
