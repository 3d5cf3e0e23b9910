"""Whether this machine, and a run that is meant for it, are ready: before the meter starts."""
