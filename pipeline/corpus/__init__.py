"""Corpus: readers, documents, splits, windows and units, answers, and the preparation of caches."""
