"""From prompts to scored rollouts: sampling, stopping, scoring."""
