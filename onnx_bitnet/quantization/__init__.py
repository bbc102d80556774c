"""From float weights to packed codes and scales: arrays only, no graphs."""
