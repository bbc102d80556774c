"""The search for a recipe that reaches the user's goals."""
