"""What a run takes before it starts: tokens, bytes, memory, hours."""
