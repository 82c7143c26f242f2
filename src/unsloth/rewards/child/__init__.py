"""What runs inside the sandbox's process; started by path, so it imports nothing of the library."""
