"""The graph pass: find linear layers, replace them by packed ops, leave the rest as it is."""
