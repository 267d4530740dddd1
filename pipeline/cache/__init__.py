"""The cache: shards of what a teacher said, small, self-describing, verified, and safe to kill at any moment."""
