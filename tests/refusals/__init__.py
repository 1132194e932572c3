"""Wrong calls: each is an error that names the argument, after which nothing has changed."""
