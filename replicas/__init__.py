"""The process that does the work, and the launcher that starts and buries such processes."""
