"""Inside a job's machine: the supervisor that sees a run from the first second to the last, and ends what costs."""
