"""Public Python API: whole jobs (`jobs`), and the parts of custom training loops (`loops`)."""
