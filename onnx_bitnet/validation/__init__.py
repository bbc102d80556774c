"""How far a converted model is from its reference, and where."""
