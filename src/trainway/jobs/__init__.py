"""A job from the outside: what is asked for, where it runs, what it costs, and how it is ended."""
