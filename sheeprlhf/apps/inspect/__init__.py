"""`inspect`: the data as training sees it."""
