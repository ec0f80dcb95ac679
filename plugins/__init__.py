"""What engines load: entry points, configuration, features."""
