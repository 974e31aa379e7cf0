"""Moving state between servers: engines that write bytes into a peer's memory."""
