"""Storage of a cache's files by relative path: a local folder, or an object store through fsspec."""
