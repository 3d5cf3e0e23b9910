"""Another machine by SSH: commands, files in and out, ports, and the job that runs there."""
