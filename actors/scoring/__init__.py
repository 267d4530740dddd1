"""Teachers score units and commit them as shards."""
