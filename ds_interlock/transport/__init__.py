"""Messages between neighbouring stages: what they look like, how they are sent, when they have arrived."""
