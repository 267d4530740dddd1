"""What flows between the teachers and the student, and where it rests. Imports neither wing."""
