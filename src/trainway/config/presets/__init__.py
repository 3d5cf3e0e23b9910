"""The shipped configurations: one YAML file per preset."""
