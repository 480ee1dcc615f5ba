"""Images in: readers of what users have, the published evaluation transform, built-in photographs."""
