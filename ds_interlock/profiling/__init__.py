"""What layers, heads and links cost, measured or counted."""
