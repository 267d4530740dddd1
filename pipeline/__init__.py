"""Recipes, models, text, the cache, planning, and the jobs of a run. Imports neither `actors` nor `student`."""
