"""Recipes: one `get_config()` a file, each with its command, cost and expected result."""
