"""What the layers of a model read, measured over data."""
