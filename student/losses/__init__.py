"""Losses: between distributions, hidden states and relations; which rows they are taken at."""
