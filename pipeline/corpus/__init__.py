"""From text files to documents, windows and units; generated answers; preparation of a cache."""
