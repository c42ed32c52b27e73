"""Commands that are not tasks, grouped by product."""
