"""What compression costs: one model in two forms side by side, a layer at a time."""
