"""Rewards of generated texts: functions, their weighted sum, penalties and running normalisation."""
