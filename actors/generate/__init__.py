"""`generate` mode: teachers answer the prompts of the corpus before they score the answers."""
