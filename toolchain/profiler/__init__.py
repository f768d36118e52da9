"""The timing and memory protocols, the on-device agent that runs them, and the profile that turns them into a cost table."""
