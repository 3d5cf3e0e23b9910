"""A job from the inside: what the machine that was rented does from its first second to its last."""
