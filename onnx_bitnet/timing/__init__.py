"""How fast models run, and how much memory they take."""
