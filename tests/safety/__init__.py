"""What stands between a user and a wrong merge."""
