"""Many processes on one run, how they watch each other, and signals that end them."""
