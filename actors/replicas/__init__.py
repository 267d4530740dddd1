"""Pools of Ray actors that serve one kind of work: scheduling, deaths, timeouts, poison rows, scaling."""
