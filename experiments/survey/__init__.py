"""Every technique, one model, one text, one table."""
