"""`doctor`: check the machine and the memory plan."""
