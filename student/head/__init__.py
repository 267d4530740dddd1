"""The LM head and the output losses, computed in chunks of rows."""
