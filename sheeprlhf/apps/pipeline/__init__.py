"""`pipeline`: trainings and evaluations in sequence."""
