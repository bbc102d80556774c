"""The steps of a conversion, and what each layer becomes."""
