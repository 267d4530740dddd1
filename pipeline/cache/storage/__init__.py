"""Files of a cache by relative path, in a local folder or an object store."""
