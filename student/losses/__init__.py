"""Training losses: divergences of distributions, feature and relation losses, token selection, schedules."""
