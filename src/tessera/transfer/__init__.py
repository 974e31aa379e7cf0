"""Moving state between servers: what fits, which bytes go where, and the engines that move them."""
