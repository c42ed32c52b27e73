"""Who trains, who is frozen, and their forward passes."""
