"""What the command line does besides running tasks."""
